"""Class names and colours."""

import json

import numpy as np
import pytest

from segmenter.classes import CLASS_SETS, ClassesError, generic_classes, load_classes

FACTS = {  # key -> classes, {id: (name, colour)}
    "ade20k": (150, {0: ("wall", (120, 120, 120)), 1: ("building", (180, 120, 120)), 2: ("sky", (6, 230, 230)),
                     8: ("windowpane", (230, 230, 230)), 56: ("pool table", (255, 71, 0)),
                     149: ("flag", (92, 0, 255))}),
    "pascal_context": (60, {0: ("background", (120, 120, 120)), 1: ("aeroplane", (180, 120, 120)),
                            37: ("person", None), 59: ("wood", (31, 0, 255))}),
    "pascal_context_59": (59, {0: ("aeroplane", (180, 120, 120)), 36: ("person", None), 58: ("wood", (31, 0, 255))}),
    "cityscapes": (19, {0: ("road", (128, 64, 128)), 10: ("sky", (70, 130, 180)), 18: ("bicycle", (119, 11, 32))}),
    "camvid": (11, {0: ("Sky", (128, 128, 128)), 3: ("Road", (128, 64, 128)), 10: ("Bicyclist", (0, 128, 192))}),
    "voc2012": (21, {0: ("background", (0, 0, 0)), 1: ("aeroplane", (128, 0, 0)), 15: ("person", (192, 128, 128)),
                     20: ("tvmonitor", (0, 64, 128))}),
    "coco_stuff": (171, {0: ("person", (0, 192, 64)), 11: ("stop sign", None), 24: ("backpack", None),
                         79: ("toothbrush", None), 80: ("banner", None), 170: ("wood", None)}),
    "mapillary_v1.2": (65, {0: ("Bird", (165, 42, 42)), 13: ("Road", (128, 64, 128)), 55: ("Car", (0, 0, 142)),
                            64: ("Ego Vehicle", (120, 10, 10))}),
    "mapillary_v2.0": (123, {0: ("Bird", (165, 42, 42)), 21: ("Road", (128, 64, 128)), 108: ("Car", (0, 0, 142)),
                             119: ("Dynamic", (111, 74, 0)), 122: ("Static", (111, 111, 0))}),
    "loveda": (7, {0: ("background", (255, 255, 255)), 3: ("water", (0, 0, 255)),
                   6: ("agricultural", (255, 195, 128))}),
    "potsdam": (6, {0: ("impervious_surface", (255, 255, 255)), 1: ("building", (0, 0, 255)),
                    4: ("car", (255, 255, 0)), 5: ("clutter", (255, 0, 0))}),
}  # fmt: skip
SHARED = {  # colours that another class has, too
    "ade20k": 1, "pascal_context": 1, "pascal_context_59": 1, "coco_stuff": 9, "mapillary_v2.0": 25,
}  # fmt: skip


@pytest.mark.parametrize("key", CLASS_SETS)
def test_shipped_sets(key):
    classes, (n, facts) = load_classes(key), FACTS[key]
    assert classes.name == key
    assert len(classes) == len(classes.names) == len(classes.palette) == n
    assert len(set(classes.names)) == n
    for i, (name, color) in facts.items():
        assert classes.names[i] == name
        assert color in (None, classes.palette[i])
    assert all(name == name.strip() and name for name in classes.names)
    assert (0, 0, 0) not in classes.palette[int(key == "voc2012") :], "black is for ignored pixels"
    assert len(set(classes.palette)) == n - SHARED.get(key, 0)


def test_pascal_context_is_alphabetical_and_coloured_like_ade20k():
    context = load_classes("pascal_context")
    assert list(context.names[1:]) == sorted(context.names[1:])
    assert context.palette == load_classes("ade20k").palette[:60]
    assert load_classes("pascal_context_59").names == context.names[1:]


def voc_color(i):
    """The colour map of VOC's development kit: the bits of i, three at a time, are the highest of red, green, blue."""
    return tuple(sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))


def test_voc_has_its_colour_map():
    assert load_classes("voc2012").palette == tuple(voc_color(i) for i in range(21))


def test_palette_array_is_black_beyond_the_classes():
    table = load_classes("cityscapes").palette_array()
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    np.testing.assert_array_equal(table[18], (119, 11, 32))
    assert not table[19:].any()
    np.testing.assert_array_equal(load_classes("cityscapes").palette_array(2), [(128, 64, 128), (244, 35, 232)])


def test_generic_colours_can_be_told_apart():
    for n, distance in ((11, 140), (20, 100), (60, 60), (256, 40)):
        classes = generic_classes(n)
        colours = np.array([*classes.palette, (0, 0, 0)], float)
        apart = np.linalg.norm(colours[:, None] - colours[None], axis=2)[~np.eye(n + 1, dtype=bool)]
        assert apart.min() > distance
        assert classes.names[n - 1] == f"class {n - 1}"
    assert generic_classes(20).palette == generic_classes(60).palette[:20], "a class keeps its colour"
    assert len(generic_classes(1000).palette) == 1000


ENTRIES = [{"id": 1, "name": "b", "color": [4, 5, 6], "isthing": 1}, {"id": 0, "name": "a", "color": [1, 2, 3]}]


@pytest.mark.parametrize("name", ["own.yml", "own.yaml", "own.json"])
def test_own_files(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps(ENTRIES) if name.endswith("json") else "".join(f"- {json.dumps(e)}\n" for e in ENTRIES))
    for source in (path, str(path)):
        classes = load_classes(source)
        assert (classes.name, classes.names, classes.palette) == ("own", ("a", "b"), ((1, 2, 3), (4, 5, 6)))


def entry(**changes):
    return [{"id": 0, "name": "a", "color": [1, 2, 3], **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list"),
        ("[]", "expected a list"),
        ("just text", "expected a list"),
        ("[1]", "expected {id, name, color}"),
        ('[{"id": 0, "name": "a"}]', "expected {id, name, color}"),
        (json.dumps(entry(id=1)), "ids must be 0..0, each once, found 1"),
        (json.dumps(entry(id=True)), "found True"),
        (json.dumps(entry() * 2), "each once, found 0"),
        (json.dumps(entry(color=[1, 2])), "three integers"),
        (json.dumps(entry(color=[1, 2, 256])), "three integers"),
        (json.dumps(entry(color="red")), "three integers"),
        ("a: [", "expected"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("[" * 5000, "recursion|nested"),
        ("x" * 1_000_001, "larger than"),
        ("\x00\x01", "special characters|unacceptable"),
        ("- !!int x", "invalid literal"),
        ("- !!timestamp x", "."),
    ],
)
def test_bad_files_are_named_with_the_cause(tmp_path, content, message):
    path = tmp_path / "own.yml"
    path.write_text(content)
    with pytest.raises(ClassesError, match=message) as caught:
        load_classes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key():
    with pytest.raises(ClassesError, match="imagenet: neither a file nor one of ade20k, pascal_context"):
        load_classes("imagenet")
