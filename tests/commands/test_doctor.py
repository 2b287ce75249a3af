"The doctor: what it counts is what is there, and each fault is found under its own name with a remedy"
import json, shutil, sys
from pathlib import Path
import pytest, torch
from vggflow.commands.doctor import (Check, Plan, adapter_size, check_device, check_disk, check_hub, check_launch, check_memory_of, check_prompts_of, check_torchvision, check_versions, count, doctor,
                            gb, look_at_model, lora_fits, memory_estimate, report, say_model, tried)
sys.path.insert(0, str(Path(__file__).parents[1]))

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    from tiny_sd3 import make_tiny_sd3
    top = tmp_path_factory.mktemp('models'); return {k: make_tiny_sd3(top/k, **kw) for k,kw in dict(whole={}, no_t5=dict(t5=False), new=dict(sd35=True), wide=dict(width=48)).items()}

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path); return tmp_path

def failed(**kw): return {c.name: c for c in doctor(**kw) if c.status == 'failed'}

@pytest.mark.parametrize('name,encoders', [('whole', 3), ('no_t5', 2), ('new', 3)])
def test_counts_are_those_of_the_loaded_model(models, name, encoders):
    from vggflow.worlds.sd3 import SD3Flow
    seen = look_at_model(models[name]); assert f'{encoders} text encoders' in say_model(seen).found
    loaded = SD3Flow.from_pretrained(models[name], lora_rank=3); p = loaded.pipe
    assert adapter_size(seen['nets']['transformer'], 3) == sum(q.numel() for q in loaded.trainable_parameters())
    own = {k: sum(q.numel() for n,q in getattr(p, k).named_parameters() if 'lora_' not in n) for k in seen['nets']}; assert own == {k: count(n) for k,n in seen['nets'].items()}
    e = memory_estimate(Plan(resolution=16, batch_size=2, lora_rank=3, dtype='float32'), seen)
    assert e['transformer'] == 4*own['transformer'] and e['decoder'] == 4*own['vae'] and e['adapter'] == 16*adapter_size(seen['nets']['transformer'], 3) and e['correction'] == 16*count(loaded.make_correction())

def test_estimate_moves_as_it_should(models):
    seen = look_at_model(models['whole']); e = lambda **kw: memory_estimate(Plan(**{**dict(resolution=16, batch_size=4, micro_batch=2), **kw}), seen)
    act = lambda **kw: e(**kw)['activations']
    assert act(gradient_checkpointing=True) < act() < act(micro_batch=4) and act(decode_checkpointing=True) < act() < act(resolution=32) and act(dtype='float32') == pytest.approx(2*act(), rel=1e-6)
    assert e(optimizer='adamw-8bit')['adapter'] == e()['adapter']*10/16 and e(ema=.99)['adapter'] == e()['adapter']*20/16 and e(correction=False)['correction'] == 0 and e(prompts=91)['prompts'] == 2*e()['prompts']
    reward = torch.nn.Linear(10, 10); assert memory_estimate(Plan(resolution=16), seen, reward)['reward'] == 4*110

def test_graphs_of_a_method_count(models, monkeypatch):
    "DRaFT keeps one for each of its last steps, ReFL one, the others two with guidance; of a checkpointed one its inputs only"
    seen = look_at_model(models['whole']); L = seen['configs']['transformer']['num_layers']
    act = lambda **kw: memory_estimate(Plan(**{**dict(resolution=16, batch_size=4, micro_batch=2, forward_batch=1), **kw}), seen)['activations']; more = lambda **kw: act(graphs=5, **kw)-act(graphs=4, **kw)
    assert act() == act(graphs=1) and act(guidance_scale=5.) == act(graphs=2, guidance_scale=5.) and more() == pytest.approx(17*more(gradient_checkpointing=True), rel=1e-6) and more()/L > 0
    plans = []; monkeypatch.setattr('vggflow.commands.doctor.check_memory_of', lambda plan, *_: plans.append(plan) or Check('memory', 'ok', '')); monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    for k in ('check_device','check_torchvision','check_hub'): monkeypatch.setattr(f'vggflow.commands.doctor.{k}', lambda *a: Check('x', 'ok', ''))
    for method,kw,graphs,dtype in [('VGG-Flow', {}, 0, 'bfloat16'), ('DRaFT', {}, 4, 'bfloat16'), ('draft', dict(options=dict(k=2, lv=3)), 6, 'bfloat16'), ('DRaFT', dict(options=dict(checkpointed=True)), 1, 'bfloat16'),
                                   ('ReFL', {}, 1, 'bfloat16'), ('AM', {}, 0, 'float32'), ('AM', dict(dtype='bfloat16'), 0, 'bfloat16'), ('Refle', {}, 0, 'bfloat16')]:
        doctor(model=models['whole'], method=method, resolution=16, transitions=5, **kw); assert (plans[-1].graphs, plans[-1].dtype, plans[-1].transitions) == (graphs, dtype, 1 if graphs else 5), method

def test_a_plain_reward_is_tried_where_the_run_will_be(here, monkeypatch):
    (here/'r.py').write_text('def f(x, p): return x.mean((1,2,3))\n'); seen = []
    monkeypatch.setattr('vggflow.judging.rewards.check_reward', lambda r, name='', device='': seen.append(device) or []); monkeypatch.setattr('vggflow.commands.doctor.check_device', lambda *a: Check('device', 'ok', ''))
    doctor(reward=f'{here}/r.py:f', device='cuda:1'); doctor(reward=f'{here}/r.py:f'); assert seen == ['cuda:1', 'cuda' if torch.cuda.is_available() else 'cpu']

def test_too_little_memory_names_what_helps(models, monkeypatch):
    seen = look_at_model(models['whole'])
    for free,status in ((2**20, 'failed'), (2**40, 'ok')):
        monkeypatch.setattr('vggflow.commands.doctor.free_memory', lambda device='': (free, free, 'GPU')); c = check_memory_of(Plan(resolution=16), seen)
        assert c.status == status and 'computed, not measured' in c.found and ('--micro-batch 1' in c.remedy and '--gradient-checkpointing' in c.remedy) == (status == 'failed')

def test_nothing_fails_where_nothing_is_wrong(models):
    checks = doctor(model=models['no_t5'], reward='redness', prompts=['a cat','an owl'], resolution=16, batch_size=2, out='run', correction='adapter', lora_dropout=.1, eval_prompts=4, stop_on=['collapse'])
    assert {'python','torch','diffusers','transformers','accelerate','peft','torchvision','device','launch','hub','model','reward','prompts','method','settings','sizes','disk','memory'} == {c.name for c in checks}
    assert not [c for c in checks if c.status == 'failed'] and 'nothing failed' in report(checks) and not Path('run').exists()
    assert all('\n' not in c.found+c.remedy for c in checks) and json.dumps([vars(c) for c in checks])

def broken(models, here, how):
    d = here/'m'; shutil.copytree(models['whole'], d)
    if how == 'no vae': shutil.rmtree(d/'vae')
    if how == 'no weights': [f.unlink() for f in (d/'transformer').glob('*.safetensors')]
    if how == 'cut off': f = d/'vae'/'diffusion_pytorch_model.safetensors'; f.write_bytes(f.read_bytes()[:-9])
    if how == 'a shard is missing': (d/'transformer'/'x.safetensors.index.json').write_text('{"weight_map": {"a": "x-2.safetensors"}}')
    if how == 'no config': (d/'text_encoder'/'config.json').unlink()
    if how == 'other class': f = d/'model_index.json'; f.write_text(f.read_text().replace('StableDiffusion3Pipeline', 'FluxPipeline'))
    return d

@pytest.mark.parametrize('how,says', [('no vae', 'vae'), ('no weights', 'no weights'), ('cut off', 'vae/diffusion_pytorch_model.safetensors is damaged'), ('a shard is missing', 'x-2.safetensors is missing'), ('no config', 'text_encoder/config.json'), ('other class', 'FluxPipeline')])
def test_a_broken_model_folder(models, here, how, says):
    bad = failed(model=broken(models, here, how)); assert list(bad) == ['model'] and says in bad['model'].found

def test_adapters(models, here):
    from vggflow.worlds.sd3 import SD3Flow
    flow = SD3Flow.from_pretrained(models['whole'], lora_rank=2, lora_alpha=4); flow.save_lora(here/'lora'); see = lambda k: look_at_model(models[k])['nets']['transformer']
    assert lora_fits(here/'lora', see('whole')) == 'rank 2, alpha 4, fits the transformer' and not failed(model=models['whole'], lora=here/'lora', resolution=16)
    SD3Flow.from_pretrained(models['new'], lora_rank=2).save_lora(here/'other')
    with pytest.raises(ValueError, match='another architecture.*attn2'): lora_fits(here/'other', see('whole'))
    big = torch.nn.Module(); big.transformer_blocks = see('whole').transformer_blocks; big.transformer_blocks[0].attn.to_q = torch.nn.Linear(999, 16, device='meta')
    with pytest.raises(ValueError, match='the layer needs 999'): lora_fits(here/'lora', big)
    assert list(failed(model=models['whole'], lora=here/'other')) == ['adapter'] and list(failed(model=models['whole'], lora=here/'none')) == ['adapter']

@pytest.mark.parametrize('kw,name,says', [(dict(reward='rednes'), 'reward', 'did you mean'), (dict(reward='pickscore@/no/folder'), 'reward', '/no/folder'), (dict(prompts='no.csv'), 'prompts', 'no.csv'), (dict(method='Refle'), 'method', 'ReFL'),
    (dict(options=dict(clop=1)), 'method', 'clop'), (dict(device='cuda:9'), 'device', 'sees no CUDA')])
def test_each_fault_under_its_name(kw, name, says, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False); bad = failed(**kw); assert list(bad) == [name] and says in bad[name].found

@pytest.mark.parametrize('kw,name,says', [(dict(steps=3, transitions=5), 'settings', 'at most the 3 steps'), (dict(method='DRaFT', steps=3), 'settings', 'k of DRaFT'), (dict(updates=0), 'settings', 'updates must be at least 1'),
    (dict(lr=-1.), 'settings', 'lr must be positive'), (dict(ema=1.), 'settings', 'ema'), (dict(optimizer='sgd'), 'settings', 'unknown optimizer'), (dict(sample_every=2), 'settings', 'out='), (dict(resolution=17), 'sizes', 'multiple of 4'), (dict(resolution=4096), 'sizes', 'up to'),
    (dict(correction='transfomer'), 'sizes', 'correction must be'), (dict(lora_rank=0), 'sizes', 'lora_rank'), (dict(lora_dropout=1.), 'sizes', 'lora_dropout'), (dict(taesd='/no/taesd'), 'sizes', '/no/taesd'), (dict(lora_targets=['no_such_layer']), 'sizes', 'no_such_layer'), (dict(beta=-1.), 'method', 'beta'), (dict(options=dict(beta='abc')), 'method', 'abc'),
    (dict(device='gpu', reward='redness'), 'device', 'unknown device'), (dict(device='cuda', reward='redness'), 'device', 'sees no CUDA')])
def test_what_a_run_refuses_the_doctor_refuses(models, kw, name, says, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False); bad = failed(**{**dict(model=models['no_t5'], batch_size=2, resolution=16), **kw}); assert list(bad) == [name] and says in bad[name].found

def test_an_option_that_no_run_has():
    with pytest.raises(ValueError, match="did you mean 'lora_rank'"): doctor(lora_rnk=3)
    with pytest.raises(ValueError, match='unknown dtype'): doctor(dtype='fp17')
    assert list(failed(lora_rank=0)) == ['sizes']   # of the emoji world's model, where none is named

def test_a_reward_that_cannot_be_used(here):
    (here/'r.py').write_text('def shape(x, p): return x.mean()\ndef nan(x, p): return x.mean((1,2,3))*float("nan")\ndef flat(x, p): return x.detach().mean((1,2,3))\n')
    for f,says in dict(shape='one number per image', nan='finite', flat='no gradient').items(): assert says in failed(reward=f'{here}/r.py:{f}')['reward'].found

def test_a_hub_id_that_is_not_there(monkeypatch):
    import huggingface_hub as hub
    def gated(*a, **k): raise hub.errors.GatedRepoError('401', response=__import__('httpx').Response(401, request=__import__('httpx').Request('GET', 'https://x')))
    monkeypatch.setattr('huggingface_hub.hf_hub_download', gated); c = failed(model='stabilityai/stable-diffusion-3.5-medium')['model']; assert 'gated' in c.found and 'hf auth login' in c.found

def test_hub(monkeypatch):
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True); assert check_hub(False).status == 'ok' and check_hub(True).status == 'warning' and '@FOLDER' in check_hub(True).remedy
    class Session:
        def head(self, *a, **k): raise TimeoutError('slow')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False); monkeypatch.setattr('huggingface_hub.utils.get_session', Session); assert check_hub(True).status == 'failed' and check_hub(False).status == 'warning'
    Session.head = lambda self, *a, **k: None; c = check_hub(True); assert c.status == 'ok' and 'no token' in c.found and 'hf auth login' in c.remedy
    monkeypatch.setattr('huggingface_hub.get_token', lambda: 'hf_secret'); assert 'hf_secret' not in str(check_hub(True)) and not check_hub(True).remedy

def test_versions(monkeypatch):
    assert {c.status for c in check_versions()} == {'ok'}
    from importlib import metadata
    real = metadata.version; monkeypatch.setattr('vggflow.commands.doctor.metadata.version', lambda n: '0.1' if n == 'peft' else real(n)); c = {c.name: c for c in check_versions()}['peft']; assert c.status == 'failed' and 'pip install' in c.remedy

def test_launch(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8'); c = check_launch(12); assert c.status == 'failed' and c.remedy == '--batch-size 16' and check_launch(16).status == 'ok'
    monkeypatch.setenv('WORLD_SIZE', '1'); monkeypatch.setattr('torch.cuda.device_count', lambda: 4); assert 'num_processes 4' in check_launch(1).remedy

def test_gpu_in_words(monkeypatch):
    for k,v in dict(is_available=lambda: True, mem_get_info=lambda d=None: (20*2**30, 24*2**30), get_device_name=lambda d=None: 'Tiny 1', is_bf16_supported=lambda: False).items(): monkeypatch.setattr(f'torch.cuda.{k}', v)
    assert check_device().status == 'failed' and 'Tiny 1, 20.0 GiB of 24.0 GiB free' in check_device().found and check_device(dtype='float32').status == 'ok'

def test_disk_and_prompts(here, monkeypatch):
    assert check_disk(here/'a'/'b').status == 'ok'; monkeypatch.setattr('vggflow.commands.doctor.shutil.disk_usage', lambda p: type('U', (), dict(free=10))); assert check_disk(here).status == 'failed'
    c = check_prompts_of(['word '*60, 'b']); assert c.status == 'warning' and '77 tokens' in c.remedy and check_prompts_of('animals').found.startswith('45:')

def test_a_check_that_raises_is_a_finding():
    def boom(): raise KeyError()
    assert tried('x', boom) == Check('x', 'failed', 'KeyError') and gb(3*2**29) == '1.5 GiB' and check_torchvision().status in ('ok', 'failed')
