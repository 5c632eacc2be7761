"""Fails a run that tested less than the last: python .ci/count.py junit.xml [windows or arm64]

.ci/counts.json has, for each Python and each other platform, how many tests its last run executed. A few fewer are a
change; more are a file that is no longer found, or a package that is missing. A file none of whose tests ran is a fault
in any case.
"""

import collections
import json
import pathlib
import sys
import xml.etree.ElementTree as ET

COUNTS = pathlib.Path(__file__).parent / "counts.json"
FEW = 3
MAY_BE_SKIPPED = {"test_weights"}  # which needs OpenAI's


def main(report, platform=None):
    ran, skipped = collections.Counter(), collections.Counter()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314  (of this very run)
        file = (case.get("classname") or case.get("name")).removeprefix("tests.").partition(".")[0]
        (skipped if case.find("skipped") is not None else ran)[file] += 1
    where, n = platform or "{}.{}".format(*sys.version_info), sum(ran.values())
    before = json.loads(COUNTS.read_text("utf-8")).get(where, 0)
    print(f"{where}: {n} tests ran, {sum(skipped.values())} were skipped; recorded: {before}")
    if silent := sorted(skipped.keys() - ran.keys() - MAY_BE_SKIPPED):
        sys.exit(f"nothing ran of: {', '.join(silent)}")
    if n < before - FEW:
        sys.exit(f"fewer tests ran than before: if that is meant, write it into {COUNTS.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
