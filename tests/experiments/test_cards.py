"Run cards: what makes a run another run, and what is refused before anything runs"

import pytest
from toy_checkout import ROOT, TOML, rewrite

from vggflow.experiments.cards import (
    experiment_names,
    has_profile,
    load_card,
    read_cards,
    read_experiments,
    template_parameters,
)
from vggflow.experiments.figures import figure_arguments, read_figures
from vggflow.experiments.schedule import make_plan


def ids(experiment="toy", profile="smoke"):
    "Ids of the runs of an experiment"
    return [card.id for card in read_cards(experiment, profile)]


def test_id_depends_on_what_matters_only(checkout):
    before = ids()
    rewrite(
        checkout,
        ("lr = 1\n", "lr = 1.0 # the same number\n"),
        ("parameters = {updates = 3}", "parameters = {bad = false, updates = 3}"),
    )
    assert ids() == before
    rewrite(checkout, ("lr = 0.5", "lr = 0.51"))
    assert ids()[0] == before[0] and ids()[1] != before[1]


def test_a_method_of_ones_own_counts_with_the_content_of_its_file(checkout):
    rewrite(checkout, ('method = "ReFL"', 'method = "my.py:Mine"'))
    (checkout / "my.py").write_text("class Mine: ...")
    before = ids()
    assert before[1].startswith("mine-s0-")
    (checkout / "my.py").write_text("class Mine: 'another'")
    assert ids()[0] == before[0] and ids()[1] != before[1]


def test_profiles_share_equal_runs(checkout):
    rewrite(checkout, ("updates = 30\npause = 0.1", "pause = 0.01"))
    assert ids(profile="smoke") == ids(profile="paper")


BAD_FILES = [
    ("lr = 0.5", "lrr = 0.5", "did you mean 'lr'?"),
    ("lr = 0.5", 'lr = "fast"', "declared float"),
    ("[toy.smoke]", "[toy.smoek]", "no key of experiment toy called 'smoek'"),
    ('template = "toy"', 'template = "tooy"', "did you mean 'toy' or 'toyfig'?"),
]


@pytest.mark.parametrize("old,new,says", BAD_FILES)
def test_bad_experiments_file(checkout, old, new, says):
    rewrite(checkout, (old, new))
    with pytest.raises(ValueError) as e:
        read_cards("toy", "smoke")
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_card_is_written_once(checkout):
    card = read_cards("toy", "smoke")[0]
    file = card.save()
    written = file.stat().st_mtime_ns
    assert card.save().stat().st_mtime_ns == written and load_card(file) == card
    file.write_text("{")
    with pytest.raises(ValueError, match="not a run card"):
        load_card(file)


# --- experiments that share runs


def test_a_sweep_is_like_another_experiment_and_shares_its_runs(checkout):
    toy, sweep = (read_cards(name, "paper") for name in ("toy", "sweep"))
    assert sweep[0].folder == toy[0].folder
    assert sweep[1].folder not in [card.folder for card in toy]
    assert {card.parameters["updates"] for card in sweep} == {30}
    assert {card.folder.parent.name for card in sweep} == {"toy"}
    rewrite(checkout, more='[more]\nlike = "sweep"\n')
    with pytest.raises(ValueError, match="is like toy; write like = 'toy'"):
        read_experiments()


def test_a_profile_may_have_series_of_its_own(checkout):
    rewrite(checkout, more='[sweep.paper]\nseries = [{method = "AM"}]\n')
    methods = [card.parameters["method"] for card in read_cards("sweep", "paper")]
    assert methods == ["AM"] and len(read_cards("sweep", "smoke")) == 2


# --- figures of the file


def test_figures_are_names_or_tables(checkout):
    figures = read_figures()
    common = dict(profile="smoke", out=str(checkout / "figures" / "smoke"))

    def arguments(name):
        return figure_arguments(figures[name], "smoke")

    assert arguments("figtoy") == dict(common, experiment="toy", figure="figtoy")
    sweep = dict(common, experiment="sweep", figure="figsweep", width=3.0)
    assert arguments("figsweep") == sweep
    assert arguments("fig07") == dict(common, needs=["toy", "sweep"])


def test_the_shown_profile_has_the_folder_itself(checkout):
    line = 'figures = {figtoy = "toyfig"}'
    rewrite(checkout, (line, f'shown = "smoke"\n{line}'))
    figures = read_figures()
    assert figures["figtoy"].folder("smoke") == checkout / "figures"
    assert figures["figtoy"].folder("paper") == checkout / "figures" / "paper"
    assert figures["figsweep"].folder("paper") == checkout / "figures", "not inherited"


BAD_FIGURES = [
    ("width = 3", "widht = 3", "did you mean 'width'?"),
    ("width = 3", 'width = "wide"', "declared float"),
    ('"sweep"]', '"swep"]', "did you mean 'sweep'?"),
    ('template = "toyfig", ', "", "has no template"),
    ("figsweep = ", "figtoy = ", "listed by toy and by sweep"),
]


@pytest.mark.parametrize("old,new,says", BAD_FIGURES)
def test_a_bad_figure_is_refused_before_anything_runs(checkout, old, new, says):
    rewrite(checkout, (old, new))
    with pytest.raises(ValueError) as e:
        make_plan("smoke", experiments=["sweep"])
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_plan_holds_only_what_a_figure_needs(checkout):
    plain = make_plan("smoke")
    assert list(plain.cards) == ["toy"] and list(plain.figures) == ["figtoy"]
    assert list(make_plan("smoke", ["figsweep"]).cards) == ["sweep"], "a study when named"
    assert list(make_plan("smoke", ["7"]).cards) == ["toy", "sweep"]
    with pytest.raises(ValueError, match="did you mean 'figtoy'"):
        make_plan("smoke", ["figto"])


def test_templates_of_this_project_declare_their_parameters():
    for path in (ROOT / "nbs" / "experiments").glob("*.ipynb"):
        for name, parameter in template_parameters(path).items():
            assert parameter["help"], f"{path.name}: {name} has no comment"


def test_the_file_of_the_tests_is_what_it_seems(checkout):
    assert (checkout / "experiments.toml").read_text() == TOML


def test_no_series_makes_a_smoke_run_long():
    "What a series says of its size does not win over the smoke profile"
    experiments = read_experiments()
    names = [
        n for n in experiment_names(experiments) if has_profile(experiments[n], "smoke")
    ]
    cards = [card for name in names for card in read_cards(name, "smoke", experiments)]
    most = dict(updates=6, batch_size=32, trajectories=16, held_out=16, images_per_prompt=4)
    for card in cards:
        own = card.parameters
        large = {k: own[k] for k in most if own.get(k, 0) > most[k]}
        assert not large, (card.experiment, card.label, large)
