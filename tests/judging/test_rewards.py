"The rewards: the paper's three through their loaders, on tiny networks made on the spot, and the emoji world's three"
import copy, json, os, random, sys
from types import SimpleNamespace
from vggflow.common.torchvision_cpu import cure; cure() # before transformers meets torchvision
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from vggflow.judging.rewards import (CLIP_MEAN, CLIP_STD, REWARDS, AestheticReward, ClipReward, HPSv2Reward, ImageReward, PickScoreReward, affine_head, check_reward, clip_pixels, reward_identity, with_paths,
                             clip_state, fitted, get_reward, parse_reward)

SIZE, WIDTH, PROMPTS = 28, 24, ['a cat', 'an owl', 'a cat on a blue background']

def tiny_tokenizer():
    letters = [c+e for c in 'abcdefghijklmnopqrstuvwxyz' for e in ('', '</w>')]
    return CLIPTokenizer(vocab={t:i for i,t in enumerate(['<|startoftext|>', *letters, '<|endoftext|>'])}, merges=[], model_max_length=20, pad_token='<|endoftext|>')

def tiny_config(tok):
    text = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=20, hidden_act='gelu',
                bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.eos_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=7, hidden_act='gelu')
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A CLIP as a hub would give it, and an aesthetic head of the LAION shape"
    torch.manual_seed(0); path = tmp_path_factory.mktemp('clip'); tok = tiny_tokenizer()
    CLIPModel(tiny_config(tok)).save_pretrained(path); tok.save_pretrained(path)
    state, n = {}, WIDTH
    for i,m in zip((0,2,4,6,7), (64,32,16,8,1)): l = nn.Linear(n, m); n = m; state |= {f'layers.{i}.weight':l.weight.data, f'layers.{i}.bias':l.bias.data}
    torch.save(state, path/'aesthetic-model.pth'); save_file(state, path/'head.safetensors')
    return path

@pytest.fixture(scope='module')
def pictures():
    "PIL images of the network's size, so that resizing is the identity, and the same as tensors"
    raw = np.random.default_rng(0).integers(0, 256, (3,SIZE,SIZE,3), dtype=np.uint8)
    return [Image.fromarray(a) for a in raw], torch.from_numpy(raw).permute(0,3,1,2).float()/255

def published(path, pil, prompts):
    "Features by the processors of transformers, unit"
    clip = CLIPModel.from_pretrained(path).eval(); tok = CLIPTokenizer.from_pretrained(path)
    pixels = CLIPImageProcessor(size={'shortest_edge':SIZE}, crop_size={'height':SIZE,'width':SIZE})(pil, return_tensors='pt')
    text = tok(prompts, padding='max_length', truncation=True, max_length=20, return_tensors='pt')
    with torch.no_grad(): image, text = clip.get_image_features(**pixels).pooler_output, clip.get_text_features(**text).pooler_output
    return clip, image/image.norm(dim=-1, keepdim=True), text/text.norm(dim=-1, keepdim=True)

def close(a, b, tol=1e-4): assert a.shape == b.shape and (a-b).abs().max() < tol, (a, b)

def test_pickscore_is_the_published_recipe(folder, pictures):
    pil, x = pictures; clip, image, text = published(folder, pil, PROMPTS); r = PickScoreReward.from_pretrained(folder)
    close(r(x, PROMPTS), clip.logit_scale.exp().detach()*(text@image.T).diagonal())
    assert (r(x, PROMPTS[::-1])-r(x, PROMPTS)).abs().max() > 1e-3 # teeth: the prompts matter

def test_hpsv2_is_the_bare_cosine(folder, pictures):
    pil, x = pictures; _, image, text = published(folder, pil, PROMPTS); r = HPSv2Reward.from_pretrained(folder)
    close(r(x, PROMPTS), (image@text.T).diagonal()); close(ClipReward.from_pretrained(folder)(x, PROMPTS), r(x, PROMPTS))

@pytest.mark.parametrize('name', ['aesthetic-model.pth', 'head.safetensors'])
def test_aesthetic_is_the_published_recipe(folder, pictures, name):
    pil, x = pictures; _, h, _ = published(folder, pil, PROMPTS); state = torch.load(folder/'aesthetic-model.pth', weights_only=True)
    for i in (0,2,4,6,7): h = h@state[f'layers.{i}.weight'].T + state[f'layers.{i}.bias']
    r = AestheticReward.from_pretrained(folder, file=name)
    close(r(x), h[:,0]); close(r(x, PROMPTS), r(x)); assert r(x).std() > 1e-4

def test_float32_whatever_the_rest_computes_in(folder, pictures):
    r = PickScoreReward.from_pretrained(folder); x = pictures[1]; want = r(x, PROMPTS)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = r(x, PROMPTS)
    assert got.dtype == torch.float32; close(got, want, 1e-5); close(r(x.bfloat16(), PROMPTS), r(x.bfloat16().float(), PROMPTS), 1e-6)

@pytest.mark.parametrize('cls', [AestheticReward, HPSv2Reward, PickScoreReward])
@pytest.mark.parametrize('hw', [(SIZE,SIZE), (40,52)])
def test_gradient_against_finite_differences(folder, cls, hw):
    r = cls.from_pretrained(folder).double(); r.clip.set_attn_implementation('sdpa') # eager attention takes its softmax in float32
    g = torch.Generator().manual_seed(1); x = torch.rand(2,3,*hw, generator=g, dtype=torch.double).requires_grad_(True); h = 1e-5
    grad, = torch.autograd.grad(r(x, PROMPTS[:2]).sum(), x)
    for _ in range(4):
        d = torch.randn(x.shape, generator=g, dtype=torch.double)
        with torch.no_grad(): slope = (r(x+h*d, PROMPTS[:2]).sum()-r(x-h*d, PROMPTS[:2]).sum())/(2*h)
        assert abs((grad*d).sum()-slope) < 1e-6*slope.abs().clamp(min=1e-3)
    assert grad.abs().flatten(1).max(1).values.min() > 0 and not any(p.requires_grad for p in r.parameters())

def test_second_derivatives_exist(folder):
    "The exact consistency mode takes a forward derivative of the gradient"
    r = PickScoreReward.from_pretrained(folder); x = torch.rand(2,3,SIZE,SIZE)
    grad = torch.func.grad(lambda y: r(y, PROMPTS[:2]).sum()); _, hv = torch.func.jvp(grad, (x,), (torch.ones_like(x),))
    assert hv.isfinite().all() and hv.abs().max() > 0

# --- how an image becomes square

def smooth(h, w):
    y, x = torch.meshgrid(torch.linspace(0,1,h), torch.linspace(0,1,w), indexing='ij')
    return torch.stack([.5+.4*torch.sin(7*x+2*y), .5+.4*torch.cos(5*y), .2+.6*x])

@pytest.mark.parametrize('hw', [(96,96), (64,96), (100,72), (20,20)])
def test_crop_is_the_processors(hw):
    pil = Image.fromarray((255*smooth(*hw)).round().byte().permute(1,2,0).numpy()); x = torch.from_numpy(np.array(pil)).permute(2,0,1)[None]/255.
    want = CLIPImageProcessor(size={'shortest_edge':SIZE}, crop_size={'height':SIZE,'width':SIZE})(pil, return_tensors='pt').pixel_values
    assert (clip_pixels(x, SIZE)-want).abs().max() < .03 # a PIL image is rounded to 1/255 before CLIP's 1/.26

def test_pad_keeps_the_whole_image_on_black():
    x = torch.ones(1,3,20,40); y = fitted(x, SIZE, 'pad'); assert y.shape[-2:] == (SIZE,SIZE)
    assert torch.allclose(y[:,:,7:21], torch.ones(1,3,14,SIZE), atol=1e-5) and y[:,:,:7].abs().max() == 0 and y[:,:,21:].abs().max() == 0
    assert fitted(x, SIZE, 'crop').min() > .999
    z = torch.rand(2,3,SIZE,SIZE); assert fitted(z, SIZE, 'pad') is z and fitted(z, SIZE) is z

# --- weights of open_clip

class Block(nn.Module):
    "As open_clip names it"
    def __init__(self, d, heads):
        super().__init__(); self.ln_1,self.ln_2,self.attn = nn.LayerNorm(d), nn.LayerNorm(d), nn.MultiheadAttention(d, heads, batch_first=True)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(d, 2*d), c_proj=nn.Linear(2*d, d)))
    def forward(self, x, mask=None):
        h = self.ln_1(x); x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))

class Tower(nn.Module):
    def __init__(self, d): super().__init__(); self.resblocks = nn.ModuleList([Block(d, 2) for _ in range(2)])
    def forward(self, x, mask=None):
        for b in self.resblocks: x = b(x, mask)
        return x

class Visual(nn.Module):
    def __init__(self, d):
        super().__init__(); p = lambda *s: nn.Parameter(.1*torch.randn(*s))
        self.class_embedding,self.positional_embedding,self.proj = p(d), p(17,d), p(d,WIDTH)
        self.conv1,self.ln_pre,self.ln_post,self.transformer = nn.Conv2d(3, d, 7, 7, bias=False), nn.LayerNorm(d), nn.LayerNorm(d), Tower(d)
    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1,2); x = torch.cat([self.class_embedding.expand(len(x),1,-1), x], 1)
        return self.ln_post(self.transformer(self.ln_pre(x+self.positional_embedding))[:,0])@self.proj

class OpenClip(nn.Module):
    "What open_clip computes, under the names of its weights"
    def __init__(self, vocab, d=32):
        super().__init__(); self.visual,self.transformer,self.token_embedding,self.ln_final = Visual(d), Tower(d), nn.Embedding(vocab, d), nn.LayerNorm(d)
        self.positional_embedding,self.text_projection = nn.Parameter(.1*torch.randn(20,d)), nn.Parameter(torch.randn(d,WIDTH)); self.logit_scale = nn.Parameter(torch.tensor(3.))
        self.register_buffer('attn_mask', torch.full((20,20), -torch.inf).triu(1))
    def encode_text(self, ids):
        h = self.ln_final(self.transformer(self.token_embedding(ids)+self.positional_embedding, self.attn_mask))
        return h[torch.arange(len(ids)), ids.argmax(-1)]@self.text_projection

@pytest.fixture(scope='module')
def checkpoint(folder, tmp_path_factory):
    torch.manual_seed(1); path = tmp_path_factory.mktemp('hps'); net = OpenClip(len(tiny_tokenizer())).eval()
    torch.save(dict(epoch=1, name='x', state_dict=net.state_dict()), path/'HPS_v2.1_compressed.pt'); return path, net

def test_open_clip_weights_give_the_published_score(folder, checkpoint, pictures):
    path, net = checkpoint; x = pictures[1]; r = HPSv2Reward.from_pretrained(path, like=folder)
    ids = tiny_tokenizer()(PROMPTS, padding='max_length', max_length=20, truncation=True, return_tensors='pt').input_ids; c = lambda v: torch.tensor(v).view(3,1,1)
    with torch.no_grad(): want = F.cosine_similarity(net.visual((x-c(CLIP_MEAN))/c(CLIP_STD)), net.encode_text(ids))
    close(r(x, PROMPTS), want)

def test_open_clip_weights_that_do_not_fit(folder, checkpoint, tmp_path):
    state = checkpoint[1].state_dict(); state.pop('ln_final.weight'); torch.save(dict(state_dict=state), tmp_path/'HPS_v2.1_compressed.pt')
    with pytest.raises(ValueError, match='does not fit the architecture') as e: HPSv2Reward.from_pretrained(tmp_path, like=folder)
    assert 'final_layer_norm' in str(e.value) and '\n' not in str(e.value)

def test_open_clip_itself_agrees():
    open_clip = pytest.importorskip('open_clip'); torch.manual_seed(2)
    cfg = dict(embed_dim=WIDTH, vision_cfg=dict(image_size=SIZE, layers=2, width=32, patch_size=7, head_width=16, mlp_ratio=2.),
               text_cfg=dict(context_length=20, vocab_size=60, width=32, heads=2, layers=2, mlp_ratio=2.))
    net = open_clip.CLIP(**cfg).eval(); tok = tiny_tokenizer(); config = tiny_config(tok); config.text_config.vocab_size = 60; config.text_config.eos_token_id = 2
    clip = CLIPModel(config).eval(); assert not clip.load_state_dict(clip_state(net.state_dict()), strict=False).unexpected_keys
    x = torch.randn(2,3,SIZE,SIZE); ids = torch.randint(3, 59, (2,20)); ids[:,-1] = 59
    with torch.no_grad(): close(clip.get_image_features(x).pooler_output, net.encode_image(x)); close(clip.get_text_features(ids).pooler_output, net.encode_text(ids))

# --- errors, in one line each

@pytest.mark.parametrize('name', ['aesthetic', 'hpsv2', 'pickscore', 'clip', 'imagereward'])
@pytest.mark.parametrize('path', ['/nowhere/at/all', 'nobody/nothing'])
def test_missing_model_says_what_to_do(name, path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='HF_HUB_OFFLINE is set') as e: get_reward(name, path=path)
    assert path in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 200

def test_published_ids_are_the_defaults():
    assert {'aesthetic','hpsv2','pickscore','clip','imagereward'} <= REWARDS.keys()
    assert (AestheticReward.path, AestheticReward.head) == ('openai/clip-vit-large-patch14', 'trl-lib/ddpo-aesthetic-predictor')
    assert (HPSv2Reward.path, PickScoreReward.path) == ('xswu/HPSv2', 'yuvalkirstain/PickScore_v1')

def test_a_clip_without_its_tokenizer_is_noticed(folder, tmp_path):
    "transformers makes an empty tokenizer without a word: every prompt would be the same"
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(OSError, match='no tokenizer|no CLIP model') as e: ClipReward.from_pretrained(tmp_path)
    assert '\n' not in str(e.value)

def test_missing_head_is_named(folder):
    with pytest.raises(OSError, match="no 'other.pth'|no other.pth"): AestheticReward.from_pretrained(folder, file='other.pth')

@pytest.mark.parametrize('shapes', [[(1,WIDTH+1)], [(8,WIDTH),(1,9)], [(2,WIDTH)]])
def test_head_of_a_wrong_shape(shapes):
    state = {f'layers.{i}.{k}': torch.zeros(s if k == 'weight' else s[:1]) for i,s in enumerate(shapes) for k in ('weight','bias')}
    with pytest.raises(ValueError, match=f'{WIDTH} features') as e: affine_head(state, WIDTH)
    assert '\n' not in str(e.value)

def test_a_pickle_is_never_run(folder, tmp_path):
    class Evil:
        def __reduce__(self): return os.system, ('touch '+str(tmp_path/'ran'),)
    torch.save(Evil(), tmp_path/'aesthetic-model.pth')
    with pytest.raises(Exception): AestheticReward.from_pretrained(folder, head=tmp_path)
    assert not (tmp_path/'ran').exists()

def test_a_prompt_is_asked_for(folder):
    with pytest.raises(ValueError, match='give prompts'): PickScoreReward.from_pretrained(folder)(torch.rand(1,3,SIZE,SIZE))

# --- the emoji world's three

EMOJI = {'emoji-aesthetic':'aesthetic', 'emoji-hps':'hps', 'emoji-pick':'pick'}

def compared(n, seed):
    "Two pictures for each of `n` prompts, true or not"
    from vggflow.worlds.emoji import captions_of, draw_factors, render
    from vggflow.judging.prompts import all_captions
    gen, rng = torch.Generator().manual_seed(seed), random.Random(seed); f = draw_factors(2*n, gen)
    f.animal[n:] = torch.where(torch.rand(n, generator=gen) < .6, f.animal[:n], f.animal[n:])
    asked = captions_of(SimpleNamespace(**{k:v[:n] for k,v in vars(f).items()}), rng)
    return f, render(f), [c if rng.random() < .7 else rng.choice(all_captions()) for c in asked]*2

def ranks(v): return torch.as_tensor(v).argsort().argsort().double()
def spearman(a, b): return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0,1].item()

@pytest.mark.parametrize('name', EMOJI)
def test_emoji_reward_knows_its_hidden_utility(name):
    from vggflow.worlds.emoji import UTILITIES, draw_factors, load_reward, prompts, render, true_utility
    f, x, asked = compared(256, 20); reward, truth, judge = load_reward(name), UTILITIES[name], true_utility(name)
    with torch.no_grad(): r, u = reward(x, asked), truth(f, asked)
    assert ((r[:256] > r[256:]) == (u[:256] > u[256:])).float().mean() > .7
    assert spearman(judge(x, asked), u) > .9 # what the probe judges is the truth on real pictures
    f = draw_factors(12*24, torch.Generator().manual_seed(25)); f.animal = torch.arange(24).repeat(12); asked = prompts*12
    with torch.no_grad(): r, u = reward(render(f), asked).view(12,24), truth(f, asked).view(12,24)
    assert sum(spearman(*v) for v in zip(r.T, u.T))/24 > .65 # comparisons are within a prompt, and so is this

@pytest.mark.parametrize('name', EMOJI)
def test_emoji_reward_is_a_tiny_real_one(name):
    "The loader of the real one gives the same number, up to zero and unit; the folder is one of transformers"
    from vggflow.worlds.emoji import asset, load_reward
    folder = asset(EMOJI[name]); own = json.loads((folder/'config.json').read_text())['reward']; CLIPModel.from_pretrained(folder)
    kind, kw = {'aesthetic':('aesthetic', dict(file='aesthetic.safetensors')), 'hps':('hpsv2', {}), 'pick':('pickscore', {})}[EMOJI[name]]
    _, x, asked = compared(8, 21); bare = get_reward(kind, path=folder, **kw)(x, asked)
    close(load_reward(name)(x, asked), (bare-own['loc'])/own['scale'], 1e-5)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1.1*2**20 and own['pair_accuracy'] <= own['ceiling']+.02

@pytest.mark.parametrize('name', EMOJI)
def test_emoji_reward_has_an_exact_gradient(name):
    from vggflow.worlds.emoji import load_reward
    r = copy.deepcopy(load_reward(name)).double(); r.parts[0].clip.set_attn_implementation('sdpa'); _, x, asked = compared(2, 22); x = x.double().requires_grad_(True)
    grad, = torch.autograd.grad(r(x, asked).sum(), x); d = torch.randn(x.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)); h = 1e-5
    with torch.no_grad(): slope = (r(x+h*d, asked).sum()-r(x-h*d, asked).sum())/(2*h)
    assert abs((grad*d).sum()-slope) < 1e-6*abs(slope).clamp(min=1)

@pytest.mark.parametrize('name', EMOJI)
def test_emoji_reward_can_be_cheated(name):
    "Gradient ascent on pixels: far beyond every real picture, while the probe loses the animals or the utility falls"
    from vggflow.worlds.emoji import load_probe, load_reward, prompts, true_utility
    _, x, _ = compared(12, 23); reward, probe = load_reward(name), load_probe(); x = x[:12]; animal = probe.read(x).animal; asked = [prompts[a] for a in animal]
    y = x.clone().requires_grad_(True); opt = torch.optim.Adam([y], .03); judge = true_utility(name, probe)
    for _ in range(50): loss = -reward(y, asked).mean(); opt.zero_grad(); loss.backward(); opt.step(); y.data.clamp_(0,1)
    assert reward(y, asked).mean() > reward(x, asked).max()
    assert (probe.read(y).animal == animal).float().mean() < .8 or judge(y, asked).mean() < judge(x, asked).mean()

def test_prompts_matter_where_they_should():
    from vggflow.worlds.emoji import load_reward
    _, x, asked = compared(96, 24); x, asked = x[:96], asked[:96]; wrong = asked[1:]+asked[:1]
    assert torch.equal(load_reward('emoji-aesthetic')(x, asked), load_reward('emoji-aesthetic')(x, None))
    for k in ('emoji-hps','emoji-pick'): assert (load_reward(k)(x, asked)-load_reward(k)(x, wrong)).mean() > .5

def test_utilities_say_what_is_asked():
    from vggflow.worlds.emoji import hps_utility, named_in, pick_utility, true_utility
    from vggflow.judging.prompts import ANIMALS, COLOURS, SIZES, caption
    assert named_in(['a big cat on a blue background', 'an emoji of an owl', 'nothing']).tolist() == [[ANIMALS.index('cat'), SIZES.index('big'), COLOURS.index('blue')], [ANIMALS.index('owl'),-1,-1], [-1]*3]
    f = SimpleNamespace(animal=torch.tensor([0]), vendor=torch.tensor([0]), hue=torch.tensor([.6]), sat=torch.tensor([.3]), scale=torch.tensor([1.]))
    cat = ANIMALS[0]; h = lambda *a: hps_utility(f, [caption(*a)]).item(); p = lambda *a: pick_utility(f, [caption(*a)]).item()
    assert h(cat)-h(ANIMALS[1]) == pytest.approx(2) and h(cat,'big')-h(cat,'small') == pytest.approx(1) and h(cat,'','blue')-h(cat,'','red') == pytest.approx(1)
    assert p(ANIMALS[1]) == 0 and p(cat,'small') == pytest.approx(p(cat)/2) and 0 < p(cat) == pytest.approx(p(cat,'big','blue'))
    with pytest.raises(ValueError, match="no utility is known for reward 'redness'"): true_utility('redness')

def test_manifest_lists_the_rewards():
    from vggflow.worlds.emoji import data_dir
    m = json.loads((data_dir()/'emoji/manifest.json').read_text())
    for k in EMOJI.values():
        assert {f'{k}/config.json', f'{k}/model.safetensors', f'{k}/tokenizer.json'} <= m['files'].keys() and m['made'][k]['notebook'] == 'nbs/emoji/scorers.ipynb'

# --- ImageReward, on random weights under the published names

IR = dict(d=128, h=64, patch=7, layers=2)

def published_weights(seed=3):
    "A state dict as THUDM/ImageReward publishes it, small; heads are 64 numbers wide as in every BLIP"
    g = torch.Generator().manual_seed(seed); d, h, s = IR['d'], IR['h'], {}; w = lambda *n: torch.randn(*n, generator=g)
    def lin(name, a, b): s[name+'.weight'], s[name+'.bias'] = w(a,b)/b**.5, .1*w(a)
    def ln(name, n): s[name+'.weight'], s[name+'.bias'] = 1+.1*w(n), .1*w(n)
    v, t = 'blip.visual_encoder.', 'blip.text_encoder.'
    s[v+'cls_token'], s[v+'pos_embed'] = w(1,1,d), w(1,(SIZE//IR['patch'])**2+1,d); s[v+'patch_embed.proj.weight'], s[v+'patch_embed.proj.bias'] = w(d,3,7,7)/12, .1*w(d); ln(v+'norm', d)
    s[t+'embeddings.position_ids'] = torch.arange(40)[None]; s[t+'embeddings.word_embeddings.weight'], s[t+'embeddings.position_embeddings.weight'] = w(60,h), w(40,h); ln(t+'embeddings.LayerNorm', h)
    for i in range(IR['layers']):
        b = f'{v}blocks.{i}.'; lin(b+'attn.qkv', 3*d, d); lin(b+'attn.proj', d, d); lin(b+'mlp.fc1', 4*d, d); lin(b+'mlp.fc2', d, 4*d); ln(b+'norm1', d); ln(b+'norm2', d)
        b = f'{t}encoder.layer.{i}.'
        for at, k in (('attention', h), ('crossattention', d)):
            lin(f'{b}{at}.self.query', h, h); lin(f'{b}{at}.self.key', h, k); lin(f'{b}{at}.self.value', h, k); lin(f'{b}{at}.output.dense', h, h); ln(f'{b}{at}.output.LayerNorm', h)
        lin(b+'intermediate.dense', 4*h, h); lin(b+'output.dense', h, 4*h); ln(b+'output.LayerNorm', h)
    n = h
    for i, m in zip((0,2,4,6,7), (1024,128,64,16,1)): lin(f'mlp.layers.{i}', m, n); n = m
    return s

def published_score(s, pixels, ids, mask):
    "The scoring recipe of ImageReward written out: BLIP's image encoder, its text encoder with cross-attention, the linear layers, zero and unit"
    lin = lambda x, n: F.linear(x, s[n+'.weight'], s[n+'.bias']); ln = lambda x, n, eps: F.layer_norm(x, x.shape[-1:], s[n+'.weight'], s[n+'.bias'], eps)
    heads = lambda x: x.unflatten(-1, (-1,64)).transpose(1,2); join = lambda x: x.transpose(1,2).flatten(2); v, t = 'blip.visual_encoder.', 'blip.text_encoder.'
    x = F.conv2d(pixels, s[v+'patch_embed.proj.weight'], s[v+'patch_embed.proj.bias'], stride=IR['patch']).flatten(2).mT
    x = torch.cat([s[v+'cls_token'].expand(len(x),-1,-1), x], 1) + s[v+'pos_embed']
    for i in range(IR['layers']):
        b = f'{v}blocks.{i}.'; q, k, val = (heads(y) for y in lin(ln(x, b+'norm1', 1e-6), b+'attn.qkv').chunk(3, -1))
        x = x + lin(join((q@k.mT/8).softmax(-1)@val), b+'attn.proj'); x = x + lin(F.gelu(lin(ln(x, b+'norm2', 1e-6), b+'mlp.fc1')), b+'mlp.fc2')
    seen = ln(x, v+'norm', 1e-6)
    y = ln(s[t+'embeddings.word_embeddings.weight'][ids] + s[t+'embeddings.position_embeddings.weight'][:ids.shape[1]], t+'embeddings.LayerNorm', 1e-12); hidden = (1-mask[:,None,None].float())*-1e4
    for i in range(IR['layers']):
        b = f'{t}encoder.layer.{i}.'
        for at, over, m in (('attention', y, hidden), ('crossattention', seen, 0)):
            over = y if at == 'attention' else seen; q, k, val = heads(lin(y, f'{b}{at}.self.query')), heads(lin(over, f'{b}{at}.self.key')), heads(lin(over, f'{b}{at}.self.value'))
            y = ln(lin(join((q@k.mT/8+m).softmax(-1)@val), f'{b}{at}.output.dense')+y, f'{b}{at}.output.LayerNorm', 1e-12)
        y = ln(lin(F.gelu(lin(y, b+'intermediate.dense')), b+'output.dense')+y, b+'output.LayerNorm', 1e-12)
    h = y[:,0]
    for i in (0,2,4,6,7): h = lin(h, f'mlp.layers.{i}')
    return (h[:,0]-0.16717362830052426)/1.0333394966054072

@pytest.fixture(scope='module')
def blip(tmp_path_factory):
    from transformers import BertTokenizer
    path = tmp_path_factory.mktemp('blip'); letters = 'abcdefghijklmnopqrstuvwxyz'; torch.save(published_weights(), path/'ImageReward.pt')
    BertTokenizer(vocab={t:i for i,t in enumerate(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]', *letters, *['##'+c for c in letters]])}).save_pretrained(path)
    return path

def test_imagereward_is_the_published_recipe(blip, pictures):
    from transformers import BertTokenizer
    _, x = pictures; s = published_weights(); c = lambda v: torch.tensor(v).view(3,1,1); r = ImageReward.from_pretrained(blip); prompts = ['a cat', 'an owl', 'z'*60]
    ids = BertTokenizer.from_pretrained(blip)(prompts, padding='max_length', truncation=True, max_length=35, return_tensors='pt')
    assert ids.input_ids.shape == (3,35) and ids.input_ids[0,0] == 2 and ids.attention_mask.sum(1).tolist() == [6, 7, 35]
    want = published_score(s, (x-c(CLIP_MEAN))/c(CLIP_STD), ids.input_ids, ids.attention_mask)
    close(r(x, prompts), want, 2e-5); assert want.std() > .01
    for k in ('blip.text_encoder.encoder.layer.1.crossattention.self.value.weight', 'blip.visual_encoder.blocks.0.attn.proj.bias', 'mlp.layers.6.bias'):   # teeth: every part matters
        off = published_score({**s, k: 1.1*s[k]}, (x-c(CLIP_MEAN))/c(CLIP_STD), ids.input_ids, ids.attention_mask); assert (off-want).abs().max() > 5e-4, k

@pytest.mark.parametrize('hw', [(SIZE,SIZE), (40,52)])
def test_imagereward_gradient_against_finite_differences(blip, hw):
    r = ImageReward.from_pretrained(blip).double(); g = torch.Generator().manual_seed(1); x = torch.rand(2,3,*hw, generator=g, dtype=torch.double).requires_grad_(True); h = 1e-5
    grad, = torch.autograd.grad(r(x, PROMPTS[:2]).sum(), x)
    for _ in range(3):
        d = torch.randn(x.shape, generator=g, dtype=torch.double)
        with torch.no_grad(): slope = (r(x+h*d, PROMPTS[:2]).sum()-r(x-h*d, PROMPTS[:2]).sum())/(2*h)
        assert abs((grad*d).sum()-slope) < 1e-6*slope.abs().clamp(min=1e-3)
    assert not any(p.requires_grad for p in r.parameters()) and check_reward(r.float()) == []

def test_imagereward_says_what_is_wrong(blip, folder, tmp_path):
    s = published_weights(); s.pop('blip.visual_encoder.blocks.1.attn.qkv.bias'); torch.save(s, tmp_path/'ImageReward.pt')
    (tmp_path/'whole').mkdir(); torch.save(published_weights(), tmp_path/'whole/ImageReward.pt')
    for kw,says in [(dict(path=tmp_path, tokenizer=blip), 'no weights encoder.layers.1.self_attn.qkv.bias'), (dict(path=folder, file='aesthetic-model.pth', tokenizer=blip), 'not a checkpoint of ImageReward'),
                    (dict(path=tmp_path/'whole'), 'no BERT tokenizer'), (dict(path='/nowhere'), "no ImageReward.pt in '/nowhere'")]:
        with pytest.raises((ValueError, OSError), match=says) as e: ImageReward.from_pretrained(**kw)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='give prompts'): ImageReward.from_pretrained(blip)(torch.rand(1,3,SIZE,SIZE))

# --- rewards from text

def test_weighted_sums_from_text(folder, pictures):
    x = pictures[1]; r = get_reward(f'clip@{folder}=0.5, aesthetic@{folder},redness=-2')
    want = .5*ClipReward.from_pretrained(folder)(x, PROMPTS) + AestheticReward.from_pretrained(folder)(x) - 2*get_reward('redness')(x)
    close(r(x, PROMPTS), want, 1e-6); assert r.__qualname__.startswith('clip@') and len(list(r.parameters())) > 50
    close(get_reward('redness=2')(x), 2*get_reward('redness')(x), 1e-6)
    assert [tuple(t) for t in parse_reward('a@/x y/z#abc=2,m:f')] == [('a',2.,'/x y/z','abc'), ('m:f',1.,None,None)]
    for bad in ('', 'a,,b', 'clip=x', '=2', '@/x'):
        with pytest.raises(ValueError, match='cannot be read') as e: get_reward(bad)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='takes no path'): get_reward('redness@/somewhere')
    with pytest.raises(ValueError, match='at once'): get_reward('redness,clip', path=folder)

def test_plugins(tmp_path, monkeypatch, pictures):
    x = pictures[1]; (tmp_path/'mine.py').write_text('import torch\ndef dark(images, prompts=None): return -images.mean((1,2,3))\nclass Net(torch.nn.Module):\n    def __init__(self, path="none"): super().__init__(); self.path = path\n'
        '    def forward(self, images, prompts): return images.amax((1,2,3))\nnet = Net()\ndef make(path="default"): return Net(path)\n1/1\n'); (tmp_path/'broken.py').write_text('1/0')
    at = f'{tmp_path}/mine.py'; close(get_reward(at+':dark')(x), -x.mean((1,2,3)), 1e-6)
    assert get_reward(at+':Net').path == 'none' and get_reward(at+':make@/there').path == '/there' and get_reward(at+':net')(x, PROMPTS).shape == (3,)
    monkeypatch.syspath_prepend(tmp_path); close(get_reward('mine:dark=3')(x), -3*x.mean((1,2,3)), 1e-6)
    from importlib.metadata import EntryPoint
    point = EntryPoint('night', 'mine:dark', 'vggflow.judging.rewards'); monkeypatch.setattr('vggflow.judging.rewards.entry_points', lambda group: [point])
    close(get_reward('night')(x), -x.mean((1,2,3)), 1e-6)
    for bad,says in [(at+':light', 'light'), (f'{tmp_path}/broken.py:f', 'division by zero'), (f'{tmp_path}/none.py:f', 'no file'), ('nomodule:f', 'nomodule'), ('nigh', "did you mean 'night'")]:
        with pytest.raises(ValueError, match=says) as e: get_reward(bad)
        assert '\n' not in str(e.value)

def test_a_module_in_the_working_directory(tmp_path, monkeypatch, pictures):
    (tmp_path/'beside_me.py').write_text('def dark(images, prompts=None): return -images.mean((1,2,3))\n'); monkeypatch.chdir(tmp_path); monkeypatch.setattr('sys.path', [p for p in sys.path if p not in ('', str(tmp_path))])
    close(get_reward('beside_me:dark')(pictures[1]), -pictures[1].mean((1,2,3)), 1e-6)
    with pytest.raises(ValueError, match="'no_such_module'"): get_reward('no_such_module:dark')

def test_every_term_of_a_sum_gives_one_number_per_image(tmp_path, pictures):
    (tmp_path/'mine.py').write_text('def scalar(images, prompts=None): return images.mean()\ndef number(images, prompts=None): return 1.\ndef column(images, prompts=None): return images.mean((1,2,3))[:,None]\n')
    for name,says in (('scalar', r'shape \(\)'), ('number', 'a float'), ('column', r'shape \(3, 1\)')):
        r = get_reward(f'redness=1,{tmp_path}/mine.py:{name}=.5')
        with pytest.raises(ValueError, match=f"'{name}' of a sum returned {says} for 3 images"): r(pictures[1], PROMPTS)

def test_identity_of_a_reward_is_its_text_and_its_source(tmp_path, monkeypatch):
    f = tmp_path/'mine.py'; f.write_text('def a(images, prompts=None): return images.mean((1,2,3))\n'); monkeypatch.chdir(tmp_path); (tmp_path/'clip').mkdir(); whole = f'{f}:a=0.5, clip@{tmp_path}/clip#v1=2'
    one = reward_identity(whole); assert one == reward_identity('mine.py:a=.5,clip@clip#v1=2.0') and one['reward'] == 'mine.py:a=0.5,clip@clip#v1=2.0' and reward_identity('redness') == dict(reward='redness=1.0')
    f.write_text(f.read_text()+'#\n'); assert reward_identity(whole)['sources'] != one['sources']
    assert with_paths('mine.py:a=0.5, clip@clip#v1=2,m:f,p@openai/x', lambda p: f'/x/{p}') == '/x/mine.py:a=0.5,clip@/x/clip#v1=2,m:f,p@/x/openai/x'

def test_published_ids_are_pinned(monkeypatch):
    "The known commit is asked for, another where one is named, and none for a folder"
    from vggflow.judging.rewards import REVISIONS, _at
    assert all(len(v) == 40 and int(v, 16) for v in REVISIONS.values()) and {ClipReward.path, PickScoreReward.path, HPSv2Reward.path, ImageReward.path, ImageReward.tokenizer_path} <= REVISIONS.keys()
    asked = []; monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda repo, name, revision=None: asked.append((repo, name, revision)) or '/dev/null')
    from vggflow.judging.rewards import _file
    _file('xswu/HPSv2', 'x.pt'); _file('xswu/HPSv2', 'x.pt', 'main'); _file('me/mine', 'x.pt')
    assert asked == [('xswu/HPSv2','x.pt',REVISIONS['xswu/HPSv2']), ('xswu/HPSv2','x.pt','main'), ('me/mine','x.pt',None)] and _at('/tmp') == {}

@pytest.mark.parametrize('reward,says', [(lambda x, p: x.mean(), 'shape'), (lambda x, p: x.mean((1,2)), 'shape'), (lambda x, p: x.mean((1,2,3)).tolist(), 'list'), (lambda x, p: x.mean((1,2,3))*float('nan'), 'finite'),
    (lambda x, p: (255*x).round().mean((1,2,3)), 'no gradient'), (lambda x, p: x.detach().mean((1,2,3)), 'no gradient'), (torch.no_grad()(lambda x, p: x.mean((1,2,3))), 'no gradient'),
    (lambda x, p: x.mean((1,2,3)).long(), 'floats'), (lambda x, p: x.numpy(), 'failed'), (lambda x: x, 'failed'), (lambda x, p: (x-x.detach()).square().sum((1,2,3)).sqrt(), 'not finite')])
def test_check_reward_finds(reward, says):
    torch.manual_seed(5); a = torch.rand(3); torch.manual_seed(5)
    with torch.no_grad(), pytest.raises(ValueError, match=says) as e: check_reward(reward, name='mine')
    assert "'mine'" in str(e.value) and '\n' not in str(e.value) and torch.equal(torch.rand(3), a)   # no global noise is drawn

def test_check_reward_notes(folder):
    assert check_reward(PickScoreReward.from_pretrained(folder)) == [] and check_reward(AestheticReward.from_pretrained(folder)) == ['the prompts do not matter']
    assert 'depends on the others' in check_reward(lambda x, p: x.mean((1,2,3))/len(x))[-1] and check_reward(lambda x, p: x.double().mean((1,2,3)))[0] == 'computed in float64'
    assert check_reward(lambda x, p: x.mean((1,2,3)), torch.rand(3,3,8,8), ['a','b','c']) == ['the prompts do not matter']
