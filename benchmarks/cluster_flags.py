"""The flags of the benchmarks that run on several workers, and what they put out."""

import json
import pathlib

from absl import flags

from benchmarks import common_flags

WORKERS = flags.DEFINE_list("workers", ["2", "4"], "Worker processes.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "File for the records.")


def expect_numbers(flag, lowest):
    """Has a list flag refused unless it holds whole numbers of at least `lowest`."""
    flags.register_validator(
        flag.name,
        lambda texts: texts and all(t.isdigit() and int(t) >= lowest for t in texts),
        message=f"Expected whole numbers of at least {lowest}, separated by commas.",
    )


def expect_params(flag, lowest):
    """Does so unless it holds numbers of parameters, such as 1M."""

    def are_params(texts):
        try:
            return bool(texts) and all(
                common_flags.count(text) >= lowest for text in texts
            )
        except (OverflowError, ValueError):
            return False

    flags.register_validator(
        flag.name,
        are_params,
        message=f"Expected numbers of at least {lowest}, such as 1M.",
    )


expect_numbers(WORKERS, 2)


def show(table, measurements):
    """Prints a table of each measurement, and writes all records so far.

    Args:
        table: A function that returns the text for some records.
        measurements: An iterable of lists of records.
    """
    records = []
    for measured in measurements:
        print(table(measured), flush=True)
        records += measured
        if OUTPUT_JSON.value:
            pathlib.Path(OUTPUT_JSON.value).write_text(json.dumps(records, indent=2))
