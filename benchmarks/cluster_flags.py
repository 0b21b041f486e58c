"""The flags of the benchmarks that run on several workers."""

from absl import flags

WORKERS = flags.DEFINE_list("workers", ["2", "4"], "Worker processes.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "File for the records.")


def expect_numbers(flag, lowest):
    """Has a list flag refused unless it holds whole numbers of at least `lowest`."""
    flags.register_validator(
        flag.name,
        lambda texts: texts and all(t.isdigit() and int(t) >= lowest for t in texts),
        message=f"Expected whole numbers of at least {lowest}, separated by commas.",
    )


expect_numbers(WORKERS, 2)
