"""Settings of training: the published ones, from files and from flags."""

import dataclasses

import pytest

from segmenter.cli.arguments import build_parser
from segmenter.cli.commands.train import recipe_of
from segmenter.training.checkpoint import write_yaml
from segmenter.training.recipe import Recipe, RecipeError, flag_kinds, make_recipe, read_recipe

OTHERS = {  # a value other than the default for every setting
    "data": "streets", "model": "weights.pth", "kind": "folder", "split": "trainval", "val_split": "test",
    "new_decoder": True, "decoder": "linear", "decoder_layers": 3, "decoder_batch_norm": True,
    "patch_size": 8, "n_layers": 6, "dropout": 0.25,
    "drop_path": 0.0, "decoder_dropout": 0.0, "freeze_backbone": True, "im_size": 360, "max_ratio": 3.0,
    "scale": (0.75, 1.5), "crop_size": 224, "cat_max_ratio": 1.0, "flip": 0.0, "photometric": False,
    "normalization": "deit", "pos_embed_mode": "bicubic", "pos_embed_check": "grid", "epochs": 7, "batch_size": 3,
    "accumulate": 3,
    "optimizer": "adamw", "learning_rate": 3e-4, "momentum": 0.8, "backbone_rate": 0.5, "layer_decay": 0.75,
    "weight_decay": 0.05,
    "min_lr": 0.0, "power": 1.0, "warmup_steps": 100, "clip_grad": 1.0, "class_weighting": 0.5, "lovasz": 1.0,
    "loss": "cross_entropy(label_smoothing=0.1) + 0.5 dice",
    "ema": 0.999, "amp": "bfloat16", "impl": "auto", "recompute": 2,
    "seed": 5, "eval_freq": 2, "save_minutes": 1.5, "log_steps": 5, "overlays": 0,
    "tensorboard": True, "workers": 0, "bad_samples": "skip", "window_size": 224, "window_stride": 112,
}  # fmt: skip
MINIMAL = {"data": "d", "crop_size": 32, "epochs": 1, "batch_size": 2, "learning_rate": 0.1}


def flags_of(settings):
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def of_command(*flags):
    return recipe_of(build_parser().parse_args(["train", "-o", "run", *flags]))


def test_there_is_another_value_for_every_setting():
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert OTHERS.keys() == names == flag_kinds().keys()
    assert all(getattr(Recipe("data"), name) != value for name, value in OTHERS.items())


def test_defaults_are_the_published_recipe():
    recipe = Recipe("d")
    published = {
        "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "min_lr": 1e-5, "power": 0.9, "warmup_steps": 0,
        "clip_grad": None, "drop_path": 0.1, "dropout": 0.0, "decoder_dropout": 0.1, "scale": (0.5, 2.0),
        "cat_max_ratio": 0.75, "flip": 0.5, "photometric": True, "amp": "none", "ema": 0.0, "layer_decay": 1.0,
        "backbone_rate": 1.0,
        "class_weighting": 0.0, "loss": "cross_entropy", "lovasz": 0.0,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in published} == published


@pytest.mark.parametrize(
    ("key", "epochs", "batch", "rate", "im_size", "ratio", "crop", "eval_freq", "window", "stride"),
    [
        ("ade20k", 64, 8, 1e-3, 512, 4, 512, 2, 512, 512),
        ("pascal_context", 256, 16, 1e-3, 520, 8, 480, 8, 480, 320),
        ("pascal_context_59", 256, 16, 1e-3, 520, 8, 480, 8, 480, 320),
        ("cityscapes", 216, 8, 1e-2, 1024, 2, 768, 4, 768, 512),
    ],
)
def test_published_settings_of_data_sets(key, epochs, batch, rate, im_size, ratio, crop, eval_freq, window, stride):
    r = Recipe("d").completed(key)
    assert (r.epochs, r.batch_size, r.learning_rate, r.im_size, r.max_ratio) == (epochs, batch, rate, im_size, ratio)
    assert (r.crop_size, r.eval_freq, r.window_size, r.window_stride) == (crop, eval_freq, window, stride)


def test_what_is_said_wins_over_what_was_published():
    recipe = Recipe("d", epochs=3, learning_rate=0.5, im_size=640).completed("ade20k")
    assert (recipe.epochs, recipe.learning_rate, recipe.im_size, recipe.batch_size) == (3, 0.5, 640, 8)


def test_windows_follow_the_crop():
    assert Recipe("d", crop_size=640).completed("ade20k").window_size == 640
    other = Recipe("d", crop_size=512).completed("cityscapes")
    assert (other.window_size, other.window_stride) == (512, 512)
    said = Recipe("d", window_size=640, window_stride=608).completed("ade20k")
    assert (said.window_size, said.window_stride) == (640, 608)
    assert Recipe("d", window_stride=480).completed("ade20k").window_size == 512
    with pytest.raises(RecipeError, match="window_stride 600 beyond window_size 512"):
        Recipe("d", window_stride=600).completed("ade20k")


def test_other_data_sets_must_say_what_was_never_published():
    recipe = Recipe(**MINIMAL).completed("folder")
    assert (recipe.im_size, recipe.max_ratio, recipe.eval_freq, recipe.window_size) == (None, 4.0, 1, 32)
    with pytest.raises(RecipeError, match="'camvid' has no published crop_size, epochs, batch_size, learning_rate"):
        Recipe("d").completed("camvid")


def test_a_recipe_survives_a_file(tmp_path):
    recipe = Recipe(**OTHERS)
    write_yaml(tmp_path / "recipe.yml", recipe.to_dict())
    assert read_recipe(tmp_path / "recipe.yml") == recipe
    assert read_recipe(tmp_path / "recipe.yml", seed=9) == dataclasses.replace(recipe, seed=9)
    done = Recipe("d").completed("ade20k")
    assert done.completed("ade20k") == done


def test_every_setting_has_a_flag():
    assert of_command(*flags_of(OTHERS)) == Recipe(**OTHERS)
    assert of_command("--data", "d") == Recipe("d")
    assert of_command("--data", "d", "--val-split", "none").val_split is None


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "r.yml").write_text("data: streets\nseed: 3\nlearning_rate: 1e-3\nphotometric: no\nval_split: null\n")
    recipe = of_command("--recipe", str(tmp_path / "r.yml"), "--seed", "4", "--photometric")
    assert recipe == Recipe("streets", seed=4, learning_rate=1e-3, val_split=None)
    assert of_command("--recipe", str(tmp_path / "r.yml"), "--no-photometric").photometric is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1}, "unknown setting lr; known: accumulate, amp, backbone_rate, bad_samples"),
        ({"epochs": 1.5}, "epochs must be an integer, found 1.5"),
        ({"epochs": True}, "epochs must be an integer, found True"),
        ({"epochs": "ten"}, "epochs must be an integer, found 'ten'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, found 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, found nan"),
        ({"learning_rate": 0}, "learning_rate must lie in"),
        ({"photometric": 1}, "photometric must be true or false, found 1"),
        ({"model": 3}, "model must be text, found 3"),
        ({"model": None}, "model must be text, found None"),
        ({"loss": "cross_entropy + dicee"}, "loss 'dicee' is unknown; choose of cross_entropy, ohem, dice"),
        ({"loss": "dice(smoth=1)"}, "dice has no argument 'smoth'; allowed are, with their defaults: smooth=0, log_lo"),
        ({"loss": "lovasz(a=1)"}, "lovasz has no argument 'a'; allowed are, with their defaults: none"),
        ({"loss": "lovasz", "lovasz": 1.0}, "loss 'lovasz' has lovasz, and so has the setting lovasz 1.0; say one"),
        ({"loss": 3}, "loss must be text, found 3"),
        ({"optimizer": "adam"}, "optimizer 'adam' is unknown; choose one of sgd, adamw"),
        ({"amp": "fp8"}, "amp 'fp8' is unknown; choose one of none, bfloat16, float16"),
        ({"drop_path": 1.0}, "drop_path must lie in 0.0..0.99999, found 1.0"),
        ({"epochs": 0}, "epochs must lie in 1..1000000, found 0"),
        ({"seed": -1}, "seed must lie in 0.."),
        ({"scale": [2.0, 0.5]}, "scale must be two rising numbers"),
        ({"scale": [0.5]}, "scale must be two numbers, found"),
        ({"scale": 1.0}, "scale must be two numbers, found 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must lie in"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        make_recipe({"data": "d", **settings})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "data is missing"),
        ("- data", "expected a mapping"),
        ("data: [", r"r.yml: is no plain YAML \(while parsing"),
        ("", "expected a mapping"),
        ("data: d\nepochs: many", "r.yml: epochs must be an integer, found 'many'"),
        ("data: d\n1: 2", "unknown setting 1"),
        ("#" * 1_000_001, "larger than 1000000 bytes"),
        ("[" * 1500, "r.yml: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="nothing.yml: cannot be read"):
        read_recipe(tmp_path / "nothing.yml")
