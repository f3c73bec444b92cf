"""The planted bugs of the figures; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

_FIGURES = ("tests/figures/test_figures.py",)
FIGURES = [
    *planted_in(
        "segmenter/figures/attention_panels.py",
        _FIGURES,
        {
            "map_of_the_first_point": ("values = maps.mean[i, query].numpy()", "values = maps.mean[i, 0].numpy()"),
            "distances_in_patches": (
                "statistics.of_patches(statistics.distance)[0] * P",
                "statistics.of_patches(statistics.distance)[0]",
            ),
            "distance_of_the_transposed_patch": (
                "distances[:, patch[0], patch[1]]",
                "distances[:, patch[1] % of.of.grid[0], patch[0]]",
            ),
            "centre_beyond_the_image": ("min(column + self.patch_size, width)", "column + self.patch_size"),
            "masks_of_the_first_classes": (".softmax(0)[ids]", ".softmax(0)[: len(ids)]"),
            "probabilities_of_the_chosen_alone": (".softmax(0)[ids]", "[ids].softmax(0)"),
            "even_distances_of_the_first_row": ("np.abs(np.arange(rows) - row)", "np.arange(rows)"),
        },
    ),
    *planted_in(
        "segmenter/figures/attended_distance.py",
        _FIGURES,
        {
            "stride_of_all_blocks": ("(1 + (n - 1) * stride)", "(n * stride)"),
            "dilation_forgotten": ("2 * dilation * step", "2 * step"),
            "diameter_for_radius": ("(np.array(fields[name]) - 1) / 2", "np.array(fields[name])"),
            "last_image_alone": ("mean = np.mean(means, 0)", "mean = np.mean(means[-1:], 0)"),
        },
    ),
    *planted_in(
        "segmenter/figures/label_panels.py",
        _FIGURES,
        {
            "scores_of_the_model_before": (
                "score = {} if true is None else image_scores(found, true, model.n_cls)",
                "score = {} if true is None else image_scores(labels[0], true, model.n_cls)",
            ),
            "ignored_pixels_in_the_first_class": ("np.where(labels == ignored, n_cls, labels)", "labels % n_cls"),
            "smallest_patch_first": ("key=lambda item: -item[1].patch_size", "key=lambda item: item[1].patch_size"),
        },
    ),
    *planted_in(
        "segmenter/figures/regions.py",
        ("tests/figures/test_regions.py",),
        {
            "regions_end_at_the_first_column": ("labels.shape[0] and 0 <= c", "labels.shape[0] and 0 < c"),
            "edge_of_the_image_is_inside": (
                "last, padded = inside, np.pad(inside, 1)",
                "last, padded = inside, np.pad(inside, 1, mode='edge')",
            ),
            "smallest_region_of_a_patch": ("_LEAST = 4", "_LEAST = 1"),
            "label_of_the_corner": (
                "np.arange(0, side, patch_size) + patch_size // 2",
                "np.arange(0, side, patch_size)",
            ),
        },
    ),
    *planted_in(
        "segmenter/cli/commands/figures.py",
        ("tests/cli/test_figures.py",),
        {
            "first_layer_for_the_view": ("args.layer[-1] if args.layer else -1", "args.layer[0] if args.layer else -1"),
            "images_forgotten": ("    if args.images is None:\n", "    if args.images is None or True:\n"),
        },
    ),
]
