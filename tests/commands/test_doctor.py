"The doctor counts what is there, and finds each fault under its own name, with a remedy"

import json
import shutil

import httpx
import pytest
import torch

from vggflow.commands import doctor as visits
from vggflow.commands.doctor import (
    check_disk,
    check_memory_need,
    check_prompts,
    describe_model,
    doctor,
)
from vggflow.commands.installation import (
    Check,
    check_hub,
    check_launch,
    check_place,
    check_torchvision,
    check_versions,
    checks_as_text,
    tried,
)
from vggflow.commands.memory import MemoryPlan, in_words, memory_estimate
from vggflow.commands.parts import (
    adapter_size,
    adapter_targets,
    check_adapter_shapes,
    count_weights,
    look_at_model,
)

KINDS = dict(whole={}, no_t5=dict(t5=False), new=dict(sd35=True), wide=dict(width=48))
SMALL = dict(resolution=16, batch_size=4, micro_batch=2)
HERE = dict(resolution=16, batch_size=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of tiny pipelines, by kind"
    from tiny_sd3 import make_tiny_sd3

    top = tmp_path_factory.mktemp("models")
    return {name: make_tiny_sd3(top / name, **how) for name, how in KINDS.items()}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failed(**settings):
    "The checks that fail, by name"
    return {c.name: c for c in doctor(**settings) if c.status == "failed"}


def without_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("name,encoders", [("whole", 3), ("no_t5", 2), ("new", 3)])
def test_counts_are_those_of_the_loaded_model(models, name, encoders):
    from vggflow import SD3Flow

    seen = look_at_model(models[name])
    assert f"{encoders} text encoders" in describe_model(seen).found
    flow = SD3Flow.from_pretrained(models[name], lora_rank=3)
    adapter = adapter_size(seen["nets"]["transformer"], 3, adapter_targets(seen["flow"]))
    assert adapter == sum(p.numel() for p in flow.trainable_parameters())
    own = {}
    for part in seen["nets"]:
        weights = getattr(flow.pipe, part).named_parameters()
        own[part] = sum(p.numel() for n, p in weights if "lora_" not in n)
    assert own == {k: count_weights(net) for k, net in seen["nets"].items()}
    plan = MemoryPlan(resolution=16, batch_size=2, lora_rank=3, dtype="float32")
    estimate = memory_estimate(plan, seen)
    tables = flow.transformer.pos_embed.pos_embed.numel()
    assert estimate["transformer"] == 4 * (own["transformer"] + tables)
    assert estimate["decoder"] == 4 * own["vae"]
    assert estimate["adapter"] == 16 * adapter
    nu = flow.make_correction()
    table = 4 * nu.net.pos_embed.pos_embed.numel()
    assert estimate["correction"] == 16 * count_weights(nu) + table


def test_estimate_moves_as_it_should(models):
    seen = look_at_model(models["whole"])

    def estimate(**settings):
        return memory_estimate(MemoryPlan(**{**SMALL, **settings}), seen)

    def activations(**settings):
        return estimate(**settings)["activations"]

    usual = activations()
    assert activations(gradient_checkpointing=True) < usual < activations(micro_batch=4)
    assert activations(decode_checkpointing=True) < usual < activations(resolution=32)
    assert activations(dtype="float32") == pytest.approx(2 * usual, rel=1e-6)
    adapter = estimate()["adapter"]
    assert estimate(optimizer="adamw-8bit")["adapter"] == adapter * 10 / 16
    assert estimate(ema=0.99)["adapter"] == adapter * 20 / 16
    assert estimate(correction=False)["correction"] == 0
    assert estimate(prompts=91)["prompts"] == 2 * estimate()["prompts"]
    reward = torch.nn.Linear(10, 10)
    assert memory_estimate(MemoryPlan(resolution=16), seen, reward)["reward"] == 4 * 110


def test_graphs_that_are_kept_count(models):
    "Of a checkpointed one its inputs only; guidance keeps two"
    seen = look_at_model(models["whole"])

    def activations(**settings):
        plan = MemoryPlan(**{**SMALL, "forward_batch": 1, **settings})
        return memory_estimate(plan, seen)["activations"]

    def of_one_more(**settings):
        return activations(graphs=5, **settings) - activations(graphs=4, **settings)

    assert activations() == activations(graphs=1)
    guided = activations(graphs=2, guidance_scale=5.0)
    assert activations(guidance_scale=5.0) == guided
    inputs = of_one_more(gradient_checkpointing=True)
    assert of_one_more() == pytest.approx(17 * inputs, rel=1e-6) and inputs > 0


METHODS = [
    ("VGG-Flow", {}, 0, "bfloat16"),
    ("DRaFT", {}, 4, "bfloat16"),
    ("draft", dict(options=dict(k=2, lv=3)), 6, "bfloat16"),
    ("DRaFT", dict(options=dict(checkpointed=True)), 1, "bfloat16"),
    ("ReFL", {}, 1, "bfloat16"),
    ("AM", {}, 0, "float32"),
    ("AM", dict(dtype="bfloat16"), 0, "bfloat16"),
    ("Refle", {}, 0, "bfloat16"),
]


@pytest.mark.parametrize("method,more,graphs,dtype", METHODS)
def test_a_method_says_what_it_keeps(models, monkeypatch, method, more, graphs, dtype):
    "DRaFT a graph for each of its last steps, ReFL one, the others two with guidance"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    seen = look_at_model(models["whole"])
    given = dict(resolution=16, transitions=5, **more)
    options = given.pop("options", None)
    plan = visits.memory_plan(given, method, options, seen, 45)
    assert (plan.graphs, plan.dtype) == (graphs, dtype)
    assert plan.transitions == (1 if graphs else 5)
    assert plan.correction == (method == "VGG-Flow")


def test_a_plain_reward_is_tried_where_the_run_will_be(here, monkeypatch):
    (here / "r.py").write_text("def f(x, p): return x.mean((1, 2, 3))\n")
    seen = []

    def note_device(reward, images=None, name="", device=""):
        seen.append(device)
        return []

    monkeypatch.setattr("vggflow.common.trial.check_reward", note_device)
    good = Check("device", "ok", "")
    monkeypatch.setattr(visits, "check_place", lambda *a: good)
    doctor(reward=f"{here}/r.py:f", device="cuda:1")
    doctor(reward=f"{here}/r.py:f")
    assert seen == ["cuda:1", "cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("free,status", [(2**20, "failed"), (2**40, "ok")])
def test_too_little_memory_names_what_helps(models, monkeypatch, free, status):
    seen = look_at_model(models["whole"])
    monkeypatch.setattr(visits, "free_memory", lambda device="": (free, free, "GPU"))
    check = check_memory_need(MemoryPlan(resolution=16), seen)
    assert check.status == status and "computed, not measured" in check.found
    for help in ("--micro-batch 1", "--gradient-checkpointing"):
        assert (help in check.remedy) == (status == "failed")


def test_nothing_fails_where_nothing_is_wrong(models):
    more = dict(correction="adapter", lora_dropout=0.1, eval_prompts=4)
    more.update(prompts=["a cat", "an owl"], reward="redness", stop_on=["collapse"])
    checks = doctor(model=models["no_t5"], out="run", **HERE, **more)
    names = "python torch diffusers transformers accelerate peft torchvision device launch "
    names += "hub model reward prompts method settings evaluation sizes disk memory"
    assert {c.name for c in checks} == {*names.split()}
    assert not [c for c in checks if c.status == "failed"]
    assert "nothing failed" in checks_as_text(checks)
    assert not any("\n" in c.found + c.remedy for c in checks)
    assert json.dumps([vars(c) for c in checks])


def test_the_doctor_reads_the_defaults_of_the_run(tmp_path):
    "What it says of the learning rate is what the run then has"
    from vggflow.commands.run import run

    check = {c.name: c for c in doctor(world="gaussian")}["settings"]
    run("gaussian", updates=1, eval_every=0, progress=False, out=tmp_path / "run")
    rate = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lr"]
    assert f"learning rate {rate:g}" in check.found


def break_model(models, here, how):
    "A folder of a pipeline with a fault"
    folder = here / "m"
    shutil.copytree(models["whole"], folder)
    if how == "no vae":
        shutil.rmtree(folder / "vae")
    if how == "no weights":
        for file in (folder / "transformer").glob("*.safetensors"):
            file.unlink()
    if how == "cut off":
        file = folder / "vae" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    if how == "a shard is missing":
        index = folder / "transformer" / "x.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "x-2.safetensors"}}')
    if how == "no config":
        (folder / "text_encoder" / "config.json").unlink()
    if how == "other class":
        file = folder / "model_index.json"
        text = file.read_text().replace("StableDiffusion3Pipeline", "FluxFillPipeline")
        file.write_text(text)
    return folder


FAULTS = [
    ("no vae", "vae"),
    ("no weights", "no weights"),
    ("cut off", "vae/diffusion_pytorch_model.safetensors is damaged"),
    ("a shard is missing", "x-2.safetensors is missing"),
    ("no config", "text_encoder/config.json"),
    ("other class", "FluxFillPipeline"),
]


@pytest.mark.parametrize("how,says", FAULTS)
def test_a_broken_model_folder(models, here, how, says):
    bad = failed(model=break_model(models, here, how))
    assert list(bad) == ["model"] and says in bad["model"].found


def test_adapters(models, here):
    from vggflow import SD3Flow

    flow = SD3Flow.from_pretrained(models["whole"], lora_rank=2, lora_alpha=4)
    flow.save_lora(here / "lora")
    net = look_at_model(models["whole"])["nets"]["transformer"]
    fits = "rank 2, 15 layers, fits the transformer"
    assert check_adapter_shapes(here / "lora", net) == fits
    assert not failed(model=models["whole"], lora=here / "lora", resolution=16)
    SD3Flow.from_pretrained(models["new"], lora_rank=2).save_lora(here / "other")
    with pytest.raises(ValueError, match="another architecture.*attn2"):
        check_adapter_shapes(here / "other", net)
    net.transformer_blocks[0].attn.to_q = torch.nn.Linear(999, 16, device="meta")
    with pytest.raises(
        ValueError, match="to_q leads from 16 to 16 there, from 999 to 16 in this"
    ):
        check_adapter_shapes(here / "lora", net)
    assert list(failed(model=models["whole"], lora=here / "other")) == ["adapter"]
    assert list(failed(model=models["whole"], lora=here / "none")) == ["adapter"]


PLAIN_FAULTS = [
    (dict(reward="rednes"), "reward", "did you mean"),
    (dict(reward="pickscore@/no/folder"), "reward", "/no/folder"),
    (dict(prompts="no.csv"), "prompts", "no.csv"),
    (dict(method="Refle"), "method", "ReFL"),
    (dict(options=dict(clop=1)), "method", "clop"),
    (dict(device="cuda:9"), "device", "sees no CUDA"),
]


@pytest.mark.parametrize("settings,name,says", PLAIN_FAULTS)
def test_each_fault_under_its_name(settings, name, says, monkeypatch):
    without_gpu(monkeypatch)
    bad = failed(**settings)
    assert list(bad) == [name] and says in bad[name].found


REFUSED = [
    (dict(steps=3, transitions=5), "settings", "at most the 3 steps"),
    (dict(method="DRaFT", steps=3), "settings", "k of DRaFT"),
    (dict(updates=0), "settings", "updates must be at least 1"),
    (dict(lr=-1.0), "settings", "lr must be positive"),
    (dict(ema=1.0), "settings", "ema"),
    (dict(optimizer="sgd"), "settings", "unknown optimizer"),
    (dict(sample_every=2), "settings", "out="),
    (dict(resolution=17), "sizes", "multiple of 4"),
    (dict(resolution=4096), "sizes", "up to"),
    (dict(correction="transfomer"), "sizes", "correction must be"),
    (dict(lora_rank=0), "sizes", "lora_rank"),
    (dict(lora_dropout=1.0), "sizes", "lora_dropout"),
    (dict(taesd="/no/taesd"), "sizes", "/no/taesd"),
    (dict(lora_targets=["no_such_layer"]), "sizes", "no_such_layer"),
    (dict(beta=-1.0), "method", "beta"),
    (dict(options=dict(beta="abc")), "method", "abc"),
    (dict(device="gpu", reward="redness"), "device", "unknown device"),
    (dict(device="cuda", reward="redness"), "device", "sees no CUDA"),
]


@pytest.mark.parametrize("settings,name,says", REFUSED)
def test_what_a_run_refuses_the_doctor_refuses(models, settings, name, says, monkeypatch):
    without_gpu(monkeypatch)
    bad = failed(**{**dict(model=models["no_t5"]), **HERE, **settings})
    assert list(bad) == [name] and says in bad[name].found


def test_an_option_that_no_run_has():
    with pytest.raises(ValueError, match="did you mean 'lora_rank'"):
        doctor(lora_rnk=3)
    with pytest.raises(ValueError, match="unknown dtype"):
        doctor(dtype="fp17")
    # of the emoji world's model, where none is named
    assert list(failed(lora_rank=0)) == ["sizes"]


REWARDS = """
def shape(x, p): return x.mean()
def nan(x, p): return x.mean((1, 2, 3)) * float("nan")
def flat(x, p): return x.detach().mean((1, 2, 3))
"""


def test_a_reward_that_cannot_be_used(here):
    (here / "r.py").write_text(REWARDS)
    faults = dict(shape="one number per image", nan="finite", flat="no gradient")
    for name, says in faults.items():
        assert says in failed(reward=f"{here}/r.py:{name}")["reward"].found


def test_a_hub_id_that_is_not_there(monkeypatch):
    import huggingface_hub as hub

    def refuse(*args, **settings):
        request = httpx.Request("GET", "https://x")
        response = httpx.Response(401, request=request)
        raise hub.errors.GatedRepoError("401", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    check = failed(model="stabilityai/stable-diffusion-3.5-medium")["model"]
    assert "gated" in check.found and "hf auth login" in check.found


class SlowSession:
    "A hub that does not answer"

    def head(self, *args, **settings):
        raise TimeoutError("slow")


class QuickSession:
    "A hub that answers"

    def head(self, *args, **settings):
        return None


def test_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert check_hub(False).status == "ok" and check_hub(True).status == "warning"
    assert "@FOLDER" in check_hub(True).remedy
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", SlowSession)
    assert check_hub(True).status == "failed" and check_hub(False).status == "warning"
    monkeypatch.setattr("huggingface_hub.utils.get_session", QuickSession)
    check = check_hub(True)
    assert check.status == "ok" and "no token" in check.found
    assert "hf auth login" in check.remedy
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert "hf_secret" not in str(check_hub(True)) and not check_hub(True).remedy


def test_versions(monkeypatch):
    assert {c.status for c in check_versions()} == {"ok"}
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0.1" if n == "peft" else real(n))
    check = {c.name: c for c in check_versions()}["peft"]
    assert check.status == "failed" and "pip install" in check.remedy


def test_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    check = check_launch(12)
    assert check.status == "failed" and check.remedy == "--batch-size 16"
    assert check_launch(16).status == "ok"
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert "num_processes 4" in check_launch(1).remedy


def test_gpu_in_words(monkeypatch):
    fake = dict(is_available=lambda: True, get_device_name=lambda d=None: "Tiny 1")
    fake["mem_get_info"] = lambda d=None: (20 * 2**30, 24 * 2**30)
    fake["is_bf16_supported"] = lambda: False
    for name, answer in fake.items():
        monkeypatch.setattr(f"torch.cuda.{name}", answer)
    check = check_place()
    assert check.status == "failed"
    assert "Tiny 1, 20.0 GiB of 24.0 GiB free" in check.found
    assert check_place(dtype="float32").status == "ok"


def test_disk_and_prompts(here, monkeypatch):
    assert check_disk(here / "a" / "b").status == "ok"
    full = type("Usage", (), dict(free=10))
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    assert check_disk(here).status == "failed"
    check = check_prompts(["word " * 60, "b"])
    assert check.status == "warning" and "77 tokens" in check.remedy
    assert check_prompts("animals").found.startswith("45:")


def test_a_check_that_raises_is_a_finding():
    def raise_nothing_said():
        raise KeyError()

    assert tried("x", raise_nothing_said) == Check("x", "failed", "KeyError")
    assert in_words(3 * 2**29) == "1.5 GiB"
    assert check_torchvision().status in ("ok", "warning", "failed")
