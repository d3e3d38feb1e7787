"""Writes OUT/dict.ltr.txt, the letters of several corpora with their counts added up: `shared_dictionary.py OUT DATA...`."""

import sys
from collections import Counter
from pathlib import Path

from s3distill.data.manifest import read_dictionary, write_dictionary


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    counts: Counter[str] = Counter()
    for folder in folders:
        counts.update(read_dictionary(folder / "dict.ltr.txt"))
    out.mkdir(parents=True, exist_ok=True)
    write_dictionary(out / "dict.ltr.txt", dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))
    print(f"wrote {out / 'dict.ltr.txt'}: {len(counts)} letters")


if __name__ == "__main__":
    main()
