"A setting that cannot be is told in one line, with its name and value."

from dataclasses import replace

import pytest
from short_runs import run

from vggflow.training.config import FinetuneConfig


def test_config_names_the_bad_value():
    with pytest.raises(ValueError, match="lr must be positive, got -1"):
        FinetuneConfig(lr=-1)
    said = "transitions must .* the 3 steps of the sampler, got 5"
    with pytest.raises(ValueError, match=said):
        run(None, steps=3)


@pytest.mark.parametrize(
    "settings,says",
    [
        (dict(updates="2"), "updates must be a whole number, got '2'"),
        (dict(updates=0), "updates must be at least 1, got 0"),
        (dict(batch_size=2.0), "batch_size must be a whole number, got 2.0"),
        (dict(steps=True), "steps must be a whole number, got True"),
        (dict(seed=None), "seed must be a whole number, got None"),
        (dict(lr="x"), "lr must be a number, got 'x'"),
        (dict(lr=float("nan")), "lr must be finite, got nan"),
        (dict(grad_clip=-1.0), "grad_clip must be at least 0, got -1"),
        (dict(grad_clip=float("inf")), "grad_clip must be finite, got inf"),
        (dict(weight_decay=-0.1), "weight_decay must be at least 0, got -0.1"),
        (dict(micro_batch=-1), "micro_batch must be at least 0, got -1"),
        (dict(shift=0.0), "shift must be positive, got 0.0"),
        (dict(ema=1.0), r"ema is a decay in \[0, 1\), got 1.0"),
        (dict(ema=-0.5), r"ema is a decay in \[0, 1\), got -0.5"),
        (dict(log_to=3), "log_to must be a name or a list of names, got 3"),
        (dict(optimizer=1), "optimizer must be text, got 1"),
        (dict(schedule="linear"), "unknown schedule 'linear': use one of constant, cosine"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_in_one_line(settings, says):
    with pytest.raises(ValueError, match=f"^FinetuneConfig: {says}") as error:
        FinetuneConfig(**settings)
    assert "\n" not in str(error.value)


def test_right_settings_are_taken_as_they_are_meant():
    import numpy as np

    config = FinetuneConfig(lr=1, grad_clip=0, log_to=["a"], updates=np.int64(3))
    assert config.log_to == ("a",) and type(config.updates) is int
    assert replace(config, log_to="b").log_to == ("b",)
    assert FinetuneConfig(shift=None).shift is None


def test_an_unknown_setting_is_an_error_as_of_any_function():
    with pytest.raises(TypeError, match="FinetuneConfig has no setting 'learning_rate'"):
        FinetuneConfig(learning_rate=1.0)
