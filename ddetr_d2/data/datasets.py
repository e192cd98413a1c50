"""Data sets out of the configuration, checked and registered in Detectron2's catalogues."""

import functools
import os
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError, nearest
from .coco_file import CocoSource, check_coco_file, is_usable_box

# What DATASETS.COCO_FORMAT has registered: annotation file and image folder by name.
_declared: dict[str, tuple[str, str]] = {}


def register_datasets(cfg: CfgNode) -> None:
    """Register ``cfg.DATASETS.COCO_FORMAT`` and check the data sets that are going to be used.

    Data sets in COCO format, Detectron2's own ones among them, are checked file by file (see
    :func:`ddetr_d2.data.coco_file.check_coco_file`), their boxes that cannot be trained on are
    dropped when they are loaded, and their metadata gets the class names. The annotation file
    that COCOEvaluator reads is not touched. Calling it again is harmless; a name declared again
    with other paths is replaced.

    Raises:
        UserError: no data set is named, a declaration is malformed, a name is not registered, a
            data set cannot be used, or two data sets have different classes.
    """
    _register_declared(cfg.DATASETS.COCO_FORMAT)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise UserError(f"DATASETS.{key} names {name!r}, {_not_registered(name)}")
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set")
    for name in names:
        # Others (LVIS, Cityscapes, functions that somebody registered) are left as they are.
        if MetadataCatalog.get(name).get("evaluator_type") == "coco":
            _check_and_wrap(
                name,
                training=name in cfg.DATASETS.TRAIN,
                testing=name in cfg.DATASETS.TEST,
                max_objects=cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES,
            )
    _common_classes([name for name in names if MetadataCatalog.get(name).get("thing_classes")])


def infer_num_classes(cfg: CfgNode) -> int:
    """The number of classes of the training sets, or of the test sets if there are none.

    :func:`register_datasets` comes first.

    Raises:
        UserError: ``cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES`` is given and contradicts it, or the
            data sets have different classes or no class names at all.
    """
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    for name in names:
        if not MetadataCatalog.get(name).get("thing_classes"):
            DatasetCatalog.get(name)  # loading sets the class names, as a rule
        if not MetadataCatalog.get(name).get("thing_classes"):
            raise UserError(
                f"data set {name!r} has no class names: "
                f"set MetadataCatalog.get({name!r}).thing_classes where it is registered"
            )
    classes = _common_classes(names)
    given = cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES
    if given > 0 and given != len(classes):
        raise UserError(
            f"MODEL.DEFORMABLE_DETR.NUM_CLASSES is {given}, but data set {names[0]!r} has "
            f"{len(classes)} classes ({_listed(classes)}): set it to {len(classes)}, or to 0 to "
            "take it from the data set"
        )
    return len(classes)


def _register_declared(declarations: Sequence) -> None:
    names = set()
    for entry in declarations:
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
        register_coco_instances(name, {}, json_file, image_root)
        _declared[name] = (json_file, image_root)


def _not_registered(name: str) -> str:
    return (
        "which is not a known data set: declare it in DATASETS.COCO_FORMAT"
        f"{nearest(name, DatasetCatalog) or '.'}"
    )


def _check_and_wrap(name: str, training: bool, testing: bool, max_objects: int) -> None:
    metadata = MetadataCatalog.get(name)
    if name in _declared:
        remedy = "correct the path in DATASETS.COCO_FORMAT"
    else:
        root = os.getenv("DETECTRON2_DATASETS", "datasets")
        remedy = (
            "Detectron2 looks for its own data sets in the folder that the environment variable "
            f"DETECTRON2_DATASETS names, now {root!r}: set it to yours"
        )
    source = CocoSource(name, metadata.json_file, metadata.image_root, remedy)
    categories = check_coco_file(
        source, training=training, testing=testing, max_objects=max_objects
    )
    classes = list(categories.values())
    known = metadata.get("thing_classes")
    if known and list(known) != classes:
        raise UserError(
            f"{source}: the file has the classes {_listed(classes)}, but the data set of this name "
            f"is known to have {_listed(known)}: declare it under another name"
        )
    if not known:
        metadata.thing_classes = classes
        metadata.thing_dataset_id_to_contiguous_id = {c: i for i, c in enumerate(categories)}

    load = DatasetCatalog[name]
    if getattr(load, "func", None) is not _load_usable:
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, functools.partial(_load_usable, load))


def _load_usable(load: Callable[[], list[dict]]) -> list[dict]:
    """Detectron2's records without the boxes that cannot be trained on."""
    records = load()
    for record in records:
        record["annotations"] = [
            annotation
            for annotation in record["annotations"]
            if is_usable_box(annotation["bbox"], record["width"], record["height"])
        ]
    return records


def _common_classes(names: Sequence[str]) -> list[str]:
    """The class names that all of ``names`` have; none for no names."""
    classes: list[str] = []
    for name in names:
        own = list(MetadataCatalog.get(name).thing_classes)
        if not classes:
            classes = own
        elif own != classes:
            raise UserError(
                f"data sets {names[0]!r} and {name!r} have different classes: {len(classes)} "
                f"({_listed(classes)}) and {len(own)} ({_listed(own)}); all data sets must name "
                "the same ones, ordered by their ids"
            )
    return classes


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
