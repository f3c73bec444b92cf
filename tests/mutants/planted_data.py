"""The planted bugs of data sets, and of what is uploaded to the hub; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

DATA = [
    *planted_in(
        "segmenter/data/label_files.py",
        ("tests/data/test_public_sets.py",),
        {
            "numbers_are_not_counted_through": (
                "return self._counted_through(ids, file) if self.stored else ids",
                "return ids",
            ),
            "numbers_counted_one_off": (
                "table[list(self.stored)] = np.arange(len(self.stored))",
                "table[list(self.stored)] = np.arange(1, len(self.stored) + 1)",
            ),
            "numbers_without_class_pass": (
                "if (wrong := values < 0).any():",
                "if (wrong := values < -1).any():",
            ),
            "rows_of_colours_left_out": (
                "rows = pixels[top : top + _ROWS]",
                "rows = pixels[: _ROWS][: len(pixels) - top]",
            ),
            "other_colours_pass": (
                "        if far.any():",
                "        if far.all():",
            ),
            "blue_is_not_looked_at": (
                "for channel, (low, high) in enumerate(bounds):",
                "for channel, (low, high) in enumerate(bounds[:2]):",
            ),
        },
    ),
    *planted_in(
        "segmenter/data/datasets.py",
        ("tests/data/test_public_sets.py",),
        {
            "two_colours_swapped": (
                "((255, 255, 255), (0, 0, 255), (0, 255, 255),",
                "((255, 255, 255), (0, 255, 255), (0, 0, 255),",
            ),
            "one_number_of_coco_stuff_too_many": (
                "if i not in (11, 25, 28,",
                "if i not in (11, 28,",
            ),
            "no_data_is_a_class": (
                '"loveda": Ids(reduce_zero=True)',
                '"loveda": Ids()',
            ),
            "unlabeled_is_another_value": (
                '"mapillary_v2.0": Ids(ignored=(123,))',
                '"mapillary_v2.0": Ids(ignored=(65,))',
            ),
            "layouts_on_demand_are_recognised": (
                "if kind or not layout.on_demand]",
                "]",
            ),
        },
    ),
    *planted_in(
        "segmenter/data/layouts.py",
        ("tests/data/test_public_sets.py",),
        {
            "voc_2010_is_voc_2012": (
                '"prefixes": ("2011_", "2012_"),',
                '"prefixes": ("20",),',
            ),
            "labels_of_val_are_those_of_sbd": (
                'labels_of={"val": "SegmentationClass"},',
                "",
            ),
            "converted_labels_are_labels": (
                'other_ending="_labelTrainIds",',
                "",
            ),
            "other_folders_count": (
                "            if last != folder:\n                continue\n",
                "",
            ),
            "a_tile_of_val_in_train": (
                "6: range(7, 13), 7: range(7, 13)}",
                "6: range(7, 13), 7: range(7, 14)}",
            ),
        },
    ),
    *planted_in(
        "segmenter/weights/hub.py",
        ("tests/weights/test_hub.py",),
        {
            "files_beside_the_save_are_uploaded": (
                "files = dict(files_of(source))",
                "files = {path.name: path for path in Path(source).iterdir() if path.is_file()}",
            ),
            "private_models_go_into_public_repositories": (
                "if private and not api.model_info(repo_id).private:",
                "if False:",
            ),
            "cards_on_the_hub_are_replaced": (
                "if card is None and not api.file_exists(repo_id, CARD):",
                "if card is None:",
            ),
            "cards_of_the_folder_get_no_header": (
                "return header + text",
                "return text",
            ),
            "private_is_not_passed_on": (
                "private=private, exist_ok=True",
                "private=None, exist_ok=True",
            ),
            "names_without_owner_are_not_completed": (
                "repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id",
                "api.create_repo(repo_id, private=private, exist_ok=True)",
            ),
        },
    ),
]
