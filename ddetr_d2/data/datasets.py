"""Data sets out of the configuration: registered, read, and their classes matched by name."""

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..class_names import listed, match_classes
from ..errors import UserError, nearest
from .coco import CocoAnnotations, CocoSource, check_objects, read_annotations, read_class_names
from .coco.annotations import Id
from .wording import counted, plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSet:
    """A data set in COCO format that is in use.

    Attributes:
        annotations: its normal form.
        class_names: the model's classes.
        category_ids: the category id of each of them; None where the set lacks it.
    """

    annotations: CocoAnnotations
    class_names: list[str]
    category_ids: list[Id | None]

    def records(self) -> list[dict]:
        """The data set as Detectron2's loaders take it, classes counted as the model does."""
        return self.annotations.records(
            {id: index for index, id in enumerate(self.category_ids) if id is not None}
        )


# What DATASETS.COCO_FORMAT has registered, and what register_datasets has read, by name.
_declared: dict[str, CocoSource] = {}
_read: dict[str, CocoSet] = {}


def register_datasets(cfg: CfgNode, model_classes: Sequence[str] | None = None) -> list[str]:
    """Register ``cfg.DATASETS.COCO_FORMAT`` and read the data sets that are going to be used.

    Data sets in COCO format, Detectron2's own ones among them, are read into their normal form
    (see :func:`ddetr_d2.data.coco.read_annotations`), which :func:`coco_set` and
    :func:`load_records` give. Classes are matched by name, whatever their ids; what does not match
    is logged. Calling it again is harmless; a name declared again with other paths is replaced.

    Args:
        cfg: the configuration.
        model_classes: names of the model's classes, where its weights tell them.

    Returns:
        the names of the model's classes: ``model_classes``, or those of the training sets (of the
        test sets, if there are none), one set's after the other's.

    Raises:
        UserError: no data set is named, a declaration is malformed, a name is not registered, a
            data set cannot be used, or one has no class in common with the model.
    """
    _declare_and_check(cfg)
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set")
    # Others (LVIS, Cityscapes, functions that somebody registered) are left as they are.
    sets = {name: _read_coco(name, cfg) for name in names if _is_coco(name)}
    own = {
        name: list(sets[name].categories.values()) if name in sets else _known_classes(name)
        for name in names
    }
    leading = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    classes = list(model_classes or []) or _union([own[name] for name in leading])
    _read.clear()
    for name in names:
        training = name in cfg.DATASETS.TRAIN
        if name not in sets:
            if own[name] != classes:
                raise UserError(
                    f"data set {name!r} has the classes {listed(own[name])}, the model "
                    f"{listed(classes)}: only of sets in COCO format are classes matched by name"
                )
            continue
        matches = match_classes(classes, own[name])
        _say_differences(sets[name].source, classes, own[name], matches, training=training)
        ids = list(sets[name].categories)
        _read[name] = CocoSet(sets[name], classes, [None if m is None else ids[m] for m in matches])
        if name in _declared:
            MetadataCatalog.get(name).thing_classes = classes
    return classes


def infer_num_classes(cfg: CfgNode, classes: Sequence[str]) -> int:
    """The number of ``classes``, as :func:`register_datasets` returns them.

    Raises:
        UserError: ``cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES`` is given and contradicts it.
    """
    given = cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES
    if given > 0 and given != len(classes):
        raise UserError(
            f"MODEL.DEFORMABLE_DETR.NUM_CLASSES is {given}, but there are {len(classes)} classes "
            f"({listed(classes)}): set it to {len(classes)}, or to 0 to take it from the data set "
            "or the weights"
        )
    return len(classes)


def coco_set(name: str) -> CocoSet | None:
    """The data set of that name as :func:`register_datasets` read it; None for other kinds."""
    return _read.get(name)


def load_records(name: str) -> list[dict]:
    """The data set of that name as Detectron2's loaders take it."""
    found = _read.get(name)
    return DatasetCatalog.get(name) if found is None else found.records()


def data_set_classes(cfg: CfgNode) -> list[str] | None:
    """Class names of the first data set of the configuration that tells them; None if none does.

    Image folders need not be there, nor the files of a set that is not asked.

    Raises:
        UserError: a declaration is malformed, a name is not registered, or an annotation file
            cannot be read.
    """
    _declare_and_check(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        known = MetadataCatalog.get(name).get("thing_classes")
        if known or _is_coco(name):
            return list(known) if known else read_class_names(coco_source(name))
    return None


def declare_data_sets(cfg: CfgNode) -> None:
    """Register ``cfg.DATASETS.COCO_FORMAT``; no file is looked at.

    Raises:
        UserError: a declaration is malformed, or has the name of another data set.
    """
    names = set()
    for entry in cfg.DATASETS.COCO_FORMAT:
        if (
            not isinstance(entry, list | tuple)
            or len(entry) != 3
            or not all(isinstance(value, str) and value for value in entry)
        ):
            raise UserError(
                f"DATASETS.COCO_FORMAT has the entry {entry!r}: [name, annotation file, image "
                "folder] is expected"
            )
        name, *paths = entry
        json_file, image_root = (os.path.expanduser(path) for path in paths)
        if name in names:
            raise UserError(f"DATASETS.COCO_FORMAT declares {name!r} twice")
        if name in DatasetCatalog and name not in _declared:
            raise UserError(
                f"DATASETS.COCO_FORMAT declares {name!r}, which is registered already: "
                "choose another name"
            )
        names.add(name)
        if name in _declared:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        _declared[name] = CocoSource(
            name, json_file, image_root, "correct the path in DATASETS.COCO_FORMAT"
        )
        DatasetCatalog.register(name, functools.partial(_load_declared, name))
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def _declare_and_check(cfg: CfgNode) -> None:
    """Register what is declared, and check that the data sets to be used are registered."""
    declare_data_sets(cfg)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise UserError(
                    f"DATASETS.{key} names {name!r}, which is not a known data set: declare it in "
                    f"DATASETS.COCO_FORMAT{nearest(name, DatasetCatalog) or '.'}"
                )


def _load_declared(name: str) -> list[dict]:
    """What Detectron2's catalogue gives to those who ask it."""
    if name in _read:
        return _read[name].records()
    annotations = read_annotations(_declared[name])
    names = list(annotations.categories.values())
    return CocoSet(annotations, names, list(annotations.categories)).records()


def _is_coco(name: str) -> bool:
    return MetadataCatalog.get(name).get("evaluator_type") == "coco"


def coco_source(name: str) -> CocoSource:
    """The annotation file and the image folder of a registered data set.

    Raises:
        UserError: it is not in COCO format.
    """
    if name in _declared:
        return _declared[name]
    metadata = MetadataCatalog.get(name)
    if not _is_coco(name) or not metadata.get("json_file"):
        raise UserError(f"data set {name!r} is not in COCO format")
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    remedy = (
        "Detectron2 looks for its own data sets in the folder that the environment variable "
        f"DETECTRON2_DATASETS names, now {root!r}: set it to yours"
    )
    return CocoSource(name, metadata.json_file, metadata.image_root, remedy)


def _read_coco(name: str, cfg: CfgNode) -> CocoAnnotations:
    source = coco_source(name)
    annotations = read_annotations(source, cfg.DATASETS.CROWDS_ARE_OBJECTS)
    check_objects(
        annotations,
        training=name in cfg.DATASETS.TRAIN,
        max_objects=cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES,
    )
    classes = list(annotations.categories.values())
    known = MetadataCatalog.get(name).get("thing_classes")
    if name not in _declared and known and list(known) != classes:
        raise UserError(
            f"{source}: the file has the classes {listed(classes)}, but the data set of this name "
            f"is known to have {listed(known)}: declare it under another name"
        )
    summary = annotations.summary()
    if summary:
        logger.log(
            logging.WARNING if annotations.left_out else logging.INFO, "%s: %s.", source, summary
        )
    if not annotations.has_annotations:
        # Such as COCO's test-dev: predictions can be written, and evaluated elsewhere.
        logger.warning("%s has no annotations: there will be predictions, but no AP.", source)
    return annotations


def _known_classes(name: str) -> list[str]:
    if not MetadataCatalog.get(name).get("thing_classes"):
        DatasetCatalog.get(name)  # loading sets the class names, as a rule
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise UserError(
            f"data set {name!r} has no class names: "
            f"set MetadataCatalog.get({name!r}).thing_classes where it is registered"
        )
    return list(classes)


def _union(lists: Sequence[Sequence[str]]) -> list[str]:
    classes: list[str] = []
    for names in lists:
        matches = match_classes(names, classes)
        classes += [name for name, found in zip(names, matches, strict=True) if found is None]
    return classes


def _say_differences(
    source: CocoSource,
    classes: Sequence[str],
    own: Sequence[str],
    matches: Sequence[int | None],
    *,
    training: bool,
) -> None:
    """Log which classes of the model a set lacks, and which of its own the model does not have.

    Raises:
        UserError: they have none in common.
    """
    lacking = [name for name, match in zip(classes, matches, strict=True) if match is None]
    unknown = [name for index, name in enumerate(own) if index not in matches]
    if len(lacking) == len(classes):
        raise UserError(
            f"{source} and the model have no class in common: the set has {listed(own)}, the model "
            f"{listed(classes)}. Classes are matched by their names"
        )
    if lacking and training:
        logger.warning(
            "%s lacks %d of the %d classes: %s. Where its images show them, they are trained as "
            "background.",
            source,
            len(lacking),
            len(classes),
            listed(lacking),
        )
    elif lacking:
        logger.info(
            "%s lacks %d of the model's %s, which %s not count in its AP: %s.",
            source,
            len(lacking),
            counted(len(classes), "class", "classes"),
            plural(len(lacking), "does", "do"),
            listed(lacking),
        )
    if unknown:
        hints = [f"{name}{nearest(name, lacking)}" for name in unknown[:10]]
        logger.warning(
            "%s has %d classes that the model does not have; they are left out of the AP: %s.",
            source,
            len(unknown),
            ", ".join(hints) + (", ..." if len(unknown) > 10 else ""),
        )
    spelt = [
        f"{name} / {own[match]}"
        for name, match in zip(classes, matches, strict=True)
        if match is not None and own[match] != name
    ]
    if spelt:
        logger.info("%s: class names taken as the same: %s.", source, listed(spelt))
