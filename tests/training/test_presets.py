"""Where options come from: the command line above a TOML file above the arch's preset."""

from __future__ import annotations

import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.training.presets import PRESETS, read_recipe, recipe_for

SMALL = arch("as_deit_small")


def test_the_papers_recipe_by_default():
    recipe = recipe_for(SMALL, False, False, 1_281_167, {"batch_size": 512}, {})
    assert recipe.steps == 30 * 1_281_167 // 512
    assert (recipe.lr, recipe.min_lr) == pytest.approx((2e-5, 2e-6))
    assert (recipe.weight_decay, recipe.warmup, recipe.clip) == (1e-6, 0, 0.0)
    assert (recipe.flops_weight, recipe.distill_weight, recipe.temperature) == (2.0, 0.5, 1e4)
    assert (recipe.smoothing, recipe.mixup, recipe.cutmix, recipe.erase) == (0.1, 0.8, 1.0, 0.25)
    assert (recipe.randaugment, recipe.repeats, recipe.ema) == (9.0, 3, 0.99996)
    assert (recipe.budget, recipe.masking) == (0.65, "attention")
    assert recipe_for(arch("as_lvvit_s"), False, False, 1, {}, {}).budget == 0.7
    # A quarter of the batch, a quarter of the rate.
    assert recipe_for(SMALL, False, False, 1, {"batch_size": 128}, {}).lr == pytest.approx(5e-6)


def test_every_arch_has_a_preset():
    assert PRESETS.keys() == ARCHS.keys()
    assert recipe_for(arch("as_deit_mini"), False, False, 1, {}, {}).augmentation.repeats == 1


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('mixup = 0\nflops-weight = 3\nlr = 1e-3\namp = "bf16"\nsteps = 7\n'
                    "thresholds = [1e-3, 2e-3, 3e-3]\n")  # fmt: skip
    read = read_recipe(file)
    recipe = recipe_for(SMALL, False, False, 100, {"lr": 5e-4, "erase": None}, read)
    assert (recipe.lr, recipe.min_lr) == pytest.approx((5e-4, 5e-5))
    assert (recipe.mixup, recipe.flops_weight, recipe.amp, recipe.steps) == (0, 3, "bf16", 7)
    assert (recipe.erase, recipe.cutmix) == (0.25, 1.0)
    assert recipe.thresholds == (1e-3, 2e-3, 3e-3)
    # Epochs on the command line stand above steps in the file.
    given = {"epochs": 2, "batch_size": 10}
    assert recipe_for(SMALL, False, False, 100, given, read).steps == 20


def test_a_dense_run_has_no_budget_and_no_average():
    recipe = recipe_for(SMALL, True, True, 100, {}, {"budget": 0.5})
    assert (recipe.budget, recipe.ema, recipe.lr, recipe.min_lr) == (None, 0.0, 1e-3, 1e-6)
    assert recipe.smoothing == 0.1
    for name, value in (("budget", 0.5), ("ema", 0.9), ("flops_weight", 1.0)):
        option = {"ema": "ema-decay"}.get(name, name.replace("_", "-"))
        with pytest.raises(UserError, match=f"--dense has no {option}; drop one"):
            recipe_for(SMALL, True, True, 100, {name: value}, {})


def test_what_is_trained_decides_what_a_preset_is():
    alone = recipe_for(SMALL, False, False, 1, {"train": "thresholds"}, {})
    assert (alone.ema, alone.smoothing, alone.distill_weight) == (0.0, 0.1, 0.5)
    assert alone.flops_weight == pytest.approx(0.5 / 4.5736, abs=1e-3)  # per GMAC
    base = recipe_for(arch("as_deit_base"), False, False, 1, {}, {"train": "thresholds"})
    assert base.flops_weight == pytest.approx(0.5 / 17.471, abs=1e-3)
    unlabelled = recipe_for(SMALL, False, False, 1, {"labels": "none", "method": "tome"}, {})
    assert (unlabelled.smoothing, unlabelled.distill_weight, unlabelled.ema) == (0.0, 1.0, 0.99996)
    assert (unlabelled.flops_weight, unlabelled.temperature) == (2.0, 200.0)
    given = {"train": "thresholds", "flops_weight": 2.0, "temperature": 10.0}
    chosen = recipe_for(SMALL, False, False, 1, given, {})
    assert (chosen.flops_weight, chosen.temperature) == (2.0, 10.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = ", "is no TOML"),
        ("learning_rate = 1", "has an unknown option 'learning_rate'; known: amp,"),
        ('lr = "1e-3"', "says lr = '1e-3', which it cannot be"),
        ("lr = true", "says lr = True"),
        ('thresholds = "fitted"', "says thresholds = 'fitted', which it cannot be"),
        ("thresholds = 0.1", "says thresholds = 0.1"),
        ("amp = 16", "says amp = 16"),
        ('thresholds = ["a"]', r"says thresholds = \['a'\]"),
        ("steps = 3\nepochs = 2", "--steps and --epochs say the same thing"),
        ("lr = nan", "r.toml says lr = nan; make it a number from 1e-30 to 1e12"),
        ('masking = "both"', "says masking = 'both'; make it one of attention, activation"),
        ("steps = 1.5", "says steps = 1.5"),
        ("steps = 0", "says steps = 0; make it a whole number"),
        ("lr = 1e-320", "says lr = 1e-320"),
        ("lr = 1e300", r"says lr = 1e\+300"),
        ("flops-weight = 1" + "0" * 400, "says flops_weight = 1000"),
        ("epochs = 9223372036854775807", "says epochs = 9223372036854775807; make it"),
        ("seed = 1" + "0" * 5000, "is no TOML: a number too long; correct it"),
        ("thresholds = " + "[" * 3000, "is no TOML: brackets too deep; correct it"),
        ("weight-decay = 1\nweight_decay = 2", "has an option twice"),
        ("epochs = 0", "says epochs = 0; make it a whole number"),
        ("batch-size = -4", "says batch_size = -4"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, said):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as refused:
        recipe_for(SMALL, False, False, 100, {}, read_recipe(file))
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_recipe(tmp_path / "no.toml")
    with pytest.raises(UserError, match="is a folder; name a TOML file"):
        read_recipe(tmp_path)
