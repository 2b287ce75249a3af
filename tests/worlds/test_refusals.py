"What is wrong with a pipeline, an option or an adapter is said in one line, beforehand"

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import errors
from tiny_flows import reload, stock_pipeline
from tiny_sd3 import make_tiny_taesd

from vggflow.worlds.checks import quietly
from vggflow.worlds.lora import lora_settings
from vggflow.worlds.sd3 import SD3Flow
from vggflow.worlds.world import load_flow


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(lora_rnak=4), "did you mean \\['lora_rank'\\]"),
        (dict(image_size=15), "multiple of 4 up to 32"),
        (dict(correction="unet"), "'transformer' or 'adapter'"),
        (dict(device="cuda"), "no CUDA GPU"),
        (dict(dtype="bf17"), "bfloat16"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(taesd="VAE"), "not an AutoencoderTiny"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(tiny, options, text):
    if options.get("device") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    vae = tiny["t5"] / "vae"
    options = {name: vae if v == "VAE" else v for name, v in options.items()}
    with pytest.raises(ValueError, match=text):
        reload(tiny["t5"], **options)


@pytest.mark.parametrize(
    "options,text",
    [
        (dict(image_size=15), "multiple of 4 up to 32"),
        (dict(lora_rank=0), "lora_rank"),
        (dict(lora_rank="8"), "lora_rank.*'8'"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(correction="unet"), "'transformer' or 'adapter'"),
        (dict(correction_layers=0), "correction_layers must be at least 1, got 0"),
        (
            dict(lora_targets=["to_w", "attn.q"]),
            r"\['to_w', 'attn.q'\] match no layer.*attn.to_q",
        ),
        (dict(lora_targets="attn.to_q"), "match no layer"),
        (dict(lora_targets=["attn.to_q", "pos_embed.proj"]), "a convolution: only linear"),
        (dict(taesd="FIVE"), "5 channels"),
        (dict(taesd="VAE"), "not an AutoencoderTiny"),
        (dict(device="gpu"), "unknown device 'gpu'"),
    ],
    ids=str,
)
def test_wrong_options_are_found_before_the_weights(
    tiny, tmp_path, monkeypatch, options, text
):
    def loads(*args, **kw):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", loads)
    five = make_tiny_taesd(tmp_path / "five", channels=5)
    folders = dict(FIVE=five, VAE=tiny["t5"] / "vae")
    options = {k: folders.get(v, v) if k == "taesd" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=text) as e:
        reload(tiny["t5"], **options)
    assert "\n" not in str(e.value)


def test_right_options_come_to_the_weights(tiny, monkeypatch):
    def loads(*args, **kw):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", loads)
    with pytest.raises(AssertionError, match="loaded"):
        reload(tiny["t5"], lora_targets=["attn.to_q", "attn.to_w"], image_size=8)


def test_other_models_are_refused(tiny, tmp_path):
    five = make_tiny_taesd(tmp_path / "five", channels=5)
    with pytest.raises(ValueError, match="5 channels"):
        reload(tiny["t5"], taesd=five)
    with pytest.raises(ValueError, match="has an adapter already"):
        SD3Flow(reload(tiny["t5"]).pipe)
    with pytest.raises(ValueError, match="did you mean .*wide"):
        reload(tiny["root"] / "wid")
    with pytest.raises(ValueError, match="no model_index.json"):
        reload(tiny["taesd"])


def test_a_broken_folder_is_refused(tiny, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text((tiny["t5"] / "model_index.json").read_text())
    with pytest.raises(ValueError, match="is missing"):
        reload(tmp_path)
    index.write_text('{"_class_name": "FluxFillPipeline"}')
    with pytest.raises(ValueError, match="a FluxFillPipeline, which is no flow here"):
        reload(tmp_path)
    index.write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="a FluxPipeline, which is no SD3Flow: open it by"):
        reload(tmp_path)


@pytest.mark.parametrize(
    "error,text",
    [
        (
            "GatedRepoError",
            "accept its licence at https://huggingface.co/stabilityai/.*hf auth login",
        ),
        (
            "RepositoryNotFoundError",
            "did you mean stabilityai/stable-diffusion-3.5-medium.*hf auth login",
        ),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "hf download"),
        ("EntryNotFoundError", "not in the format of diffusers"),
        ("OfflineModeIsEnabled", "check the connection"),
    ],
)
def test_errors_of_the_hub_name_the_remedy(monkeypatch, error, text):
    "And nothing large is asked for"
    raised = getattr(errors, error).__new__(getattr(errors, error), "text")

    def fail(*args, **kw):
        raise raised

    def loads(*args, **kw):
        pytest.fail("asked for the weights")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", loads)
    with pytest.raises(ValueError, match=text):
        SD3Flow.from_pretrained("stabilityai/stable-difusion-3.5-medium", revision="v9")


LAYER = "transformer_blocks.0.attn.add_k_proj"


@pytest.fixture
def lora(tiny, tmp_path):
    "The folder of an adapter, and its settings"
    reload(tiny["t5"], lora_rank=4, lora_alpha=6).save_lora(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize(
    "model,options,text",
    [
        (
            "wide",
            dict(lora_rank=4, lora_alpha=6),
            f"architecture: {LAYER} leads from 16 to 16 there, from 32 to 32 in this model",
        ),
        ("t5", dict(lora_rank=2), f"at {LAYER} it has rank 4, the flow 2.*lora_rank"),
        (
            "t5",
            dict(lora_rank=4, lora_alpha=6, lora_targets=["attn.to_q"]),
            f"{LAYER} is adapted in it only.*lora_targets",
        ),
    ],
    ids=str,
)
def test_a_lora_that_does_not_fit(tiny, lora, model, options, text):
    "The first layer is named, and in what it differs"
    with pytest.raises(ValueError, match=text):
        reload(tiny[model], **options).load_lora(lora)


def test_a_lora_by_its_settings(tiny, lora, tmp_path):
    settings = lora_settings(lora)
    assert (settings["lora_rank"], settings["lora_alpha"]) == (
        4,
        4,
    )  # 6/4 is in the weights
    assert "attn.to_q" in settings["lora_targets"]
    flow = reload(tiny["t5"], shake=0, **settings)
    flow.load_lora(lora)
    assert all(weight.abs().max() > 0 for weight in flow.trainable_parameters())
    with pytest.raises(ValueError, match="no adapter can be read"):
        flow.load_lora(tmp_path / "nothing")


@pytest.mark.parametrize("how", ["cpu_offload", "cpu_offload_with_hook"])
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_an_offloaded_pipeline_is_refused(tiny, how, part):
    "Its weights are not where they are looked for"
    import accelerate

    pipe = stock_pipeline(tiny["t5"])
    getattr(accelerate, how)(getattr(pipe, part), "cpu")
    with pytest.raises(
        ValueError, match=f"{part} is offloaded.*remove_all_hooks"
    ) as caught:
        SD3Flow(pipe)
    assert "\n" not in str(caught.value)


BAD_SIZES = [0, -8, 8.5, "x16", "16x", (16, 7), [16, 16, 16], []]


@pytest.mark.parametrize("size", BAD_SIZES, ids=str)
def test_an_image_size_that_is_none(tiny, size):
    with pytest.raises(ValueError, match="image_size must be a multiple of 4"):
        reload(tiny["t5"], image_size=size)


ODD_SETTINGS = [
    dict(lora_alpha=0),
    dict(lora_alpha=float("nan")),
    dict(lora_alpha=-1),
    dict(lora_alpha="8"),
    dict(lora_rank=True),
    dict(lora_targets=5),
    dict(lora_targets="("),
    dict(guidance_scale=float("nan")),
    dict(guidance_scale="3"),
    dict(guidance_scale=[5]),
    dict(negative_prompt=["a cat"]),
    dict(max_sequence_length="77"),
    dict(max_sequence_length=77.5),
    dict(text_batch=0),
    dict(text_batch="4"),
]


@pytest.mark.parametrize("options", ODD_SETTINGS, ids=str)
def test_a_setting_of_another_kind_is_refused_when_it_is_given(tiny, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name) as caught:
        reload(tiny["t5"], **options)
    assert "\n" not in str(caught.value)


def test_no_negative_prompt_is_the_empty_one(tiny):
    assert reload(tiny["t5"], negative_prompt=None).negative_prompt == ""


@pytest.mark.parametrize("words", ["blurry", "x" * 400])
def test_a_text_is_no_path_whatever_lies_beside(tiny, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / words[:100]).mkdir()
    with quietly():
        flow = load_flow(str(tiny["t5"]), negative_prompt=words)
    assert flow.recipe["negative_prompt"] == words
