"""The planted bugs of files, training and its schedule; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

DURABILITY = [
    *planted_in(
        "segmenter/training/loop.py",
        ("tests/test_durability.py",),
        {
            "average_not_restored": (
                "self.average.load_state_dict(",
                "dict(average=",
            ),
            "schedule_not_restored": (
                "self.schedule.load_state_dict(",
                "dict(schedule=",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/loop.py",
        ("tests/training/test_loop.py",),
        {
            "parts_of_a_batch_in_one": (
                "zip(images.chunk(parts), labels.chunk(parts), strict=True)",
                "[(images, labels)]",
            ),
            "losses_of_parts_are_not_added": (
                "            total += loss.detach()",
                "            total = loss.detach()",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/losses.py",
        ("tests/training/test_loop.py",),
        {
            "added_losses_of_every_part_count_whole": (
                "loss + part * added",
                "loss + added",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/distributed.py",
        ("tests/training/test_processes.py",),
        {
            "gradients_of_the_last_part_are_exchanged_never": (
                "self.world == 1 or exchange else",
                "self.world == 1 else",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/distributed.py",
        ("tests/training/test_sharded.py",),
        {
            "masks_without_their_weights": (
                'register_fsdp_forward_method(model, "masks")',
                'register_fsdp_forward_method(model, "forward")',
            ),
            "nothing_but_blocks_is_sharded": (
                "    fully_shard(model, **options)\n",
                "",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/upsample_loss.py",
        ("tests/training/test_sharded.py",),
        {
            "labels_looked_at_while_compiling": (
                " or torch.compiler.is_compiling():",
                ":",
            ),
            "threads_counted_while_compiling": (
                "_threads._dynamo_marked_constant = True",
                "_threads._dynamo_marked_constant = False",
            ),
        },
    ),
    *planted_in(
        "segmenter/files.py",
        ("tests/test_durability.py",),
        {
            "renamed_before_it_is_on_the_disk": (
                "                os.fsync(",
                "                id(",
            ),
            "names_not_brought_onto_the_disk": (
                "        flush(path.parent)\n    except Exception as error:\n",
                "    except Exception as error:\n",
            ),
        },
    ),
    *planted_in(
        "segmenter/files.py",
        ("tests/test_durability.py",),
        {
            "pipes_are_read": (
                "if not stat.S_ISREG(mode)",
                "if None and stat.S_ISREG(mode)",
            ),
        },
    ),
]

SCHEDULE = planted_in(
    "segmenter/training/schedule.py",
    ("tests/training/test_schedule.py",),
    {
        "iter_max_not_truncated": (
            "self.iter_max = int(iter_max)",
            "self.iter_max = iter_max",
        ),
        "iter_warmup_not_truncated": (
            "self.iter_warmup = int(iter_warmup)",
            "self.iter_warmup = iter_warmup",
        ),
    },
)
