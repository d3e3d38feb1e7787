"""Label files of utterance classification: line i of `SPLIT.digit` is the class of line i + 1 of `SPLIT.tsv`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from s3distill.data.manifest import MAX_LISTED_FAULTS, PathLike, read_dictionary
from s3distill.data.manifest_lines import Fault, Manifest, read_lines

_REMEDY = "write one class name a line, in the order of the manifest"
_MAX_LISTED_CLASSES = 12


def read_utterance_labels(
    path: PathLike, manifest: Manifest, classes: Sequence[str] | None = None, source: str = "the training labels"
) -> list[str]:
    """The class name of every utterance of a manifest, checked.

    Args:
        path: the label file.
        manifest: the manifest that it belongs to.
        classes: what a label may be; None allows every name.
        source: where these classes come from, for messages.
    Raises:
        ValueError: the first faults with file, line, rule and remedy: another number of lines, an empty one, several words
            in one, or a label that is none of ``classes``.
    """
    path = Path(path)
    lines, faults = read_lines(path, "label file", _REMEDY)
    if not faults and len(lines) != manifest.num_lines:
        rule = f"a label file must have a line for each of the {manifest.num_lines} utterances of {manifest.path}"
        faults.append(Fault(str(path), None, rule, f"it has {len(lines)}", "write manifest and labels again, together"))
    labels = [line.strip() for line in lines]
    faults += _line_faults(path, labels, classes, source)
    _raise(faults, path)
    return labels


def _line_faults(path: Path, labels: Sequence[str], classes: Collection[str] | None, source: str) -> Iterator[Fault]:
    for number, label in enumerate(labels, start=1):
        if not label:
            remedy = "add the class, or remove the utterance"
            yield Fault(str(path), number, "a label line must not be empty", "it is", remedy)
        elif len(label.split()) > 1:
            rule, remedy = "a label line must hold one class name, without spaces", "join its words with _"
            yield Fault(str(path), number, rule, f"it is {label!r}", remedy)
        elif classes is not None and label not in classes:
            rule = f"a label must be one of the {len(classes)} classes of {source} ({_listed(list(classes))})"
            remedy = "correct the line, remove the utterance, or train on labels that have this class"
            yield Fault(str(path), number, rule, f"it is {label!r}", remedy)


def classes_of_dictionary(path: PathLike) -> list[str]:
    """The classes of a fairseq dictionary (`class count` a line), in its order; raises `ValueError` with its first fault."""
    return _at_least_two(list(read_dictionary(path)), str(path))


def classes_of_labels(path: PathLike) -> list[str]:
    """The classes that a label file has, sorted as text.

    Raises:
        ValueError: it cannot be read, has a faulty line, or a single class.
    """
    path = Path(path)
    lines, faults = read_lines(path, "label file", _REMEDY)
    labels = [line.strip() for line in lines]
    _raise([*faults, *_line_faults(path, labels, None, "")], path)
    return _at_least_two(sorted(set(labels)), str(path))


def _at_least_two(classes: list[str], source: str) -> list[str]:
    if len(classes) < 2:
        raise ValueError(
            f"{source}: there must be at least two classes to tell apart, but there is {_listed(classes) or 'none'}"
        )
    return classes


def _listed(classes: Sequence[str]) -> str:
    rest = len(classes) - _MAX_LISTED_CLASSES
    return ", ".join(classes[:_MAX_LISTED_CLASSES]) + (f" and {rest} more" if rest > 0 else "")


def _raise(faults: Sequence[Fault], path: Path) -> None:
    if not faults:
        return
    listed = "\n  ".join(map(str, faults[:MAX_LISTED_FAULTS]))
    more = len(faults) - MAX_LISTED_FAULTS
    raise ValueError(f"{path} cannot be used:\n  {listed}" + (f"\n  and {more} more" if more > 0 else ""))
