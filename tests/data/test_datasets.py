"""Data sets out of the configuration."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import builtin, register_coco_instances
from detectron2.evaluation import COCOEvaluator

from ddetr_d2.data import infer_num_classes, register_datasets
from ddetr_d2.errors import UserError


def test_own_data_set(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    for _ in range(2):
        register_datasets(cfg)
        assert infer_num_classes(cfg) == 2
        assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog"]
        records = get_detection_dataset_dicts(("pets",), filter_empty=False)
        assert [len(r["annotations"]) for r in records] == [2, 1, 0]


def test_declared_on_the_command_line(cfg, coco):
    name, json_file, images = coco.entry("pets")
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[['{name}', '{json_file}', '{images}']]"])
    cfg.merge_from_list(["DATASETS.TRAIN", "('pets',)"])
    register_datasets(cfg)
    assert infer_num_classes(cfg) == 2


def test_declared_again_with_other_paths(cfg, coco, other_coco):
    other_coco.content["categories"][0]["name"] = "cow"
    other_coco.write()
    cfg.DATASETS.TRAIN = ("pets",)
    for folder, classes in ((coco, ["cat", "dog"]), (other_coco, ["cow", "dog"])):
        cfg.DATASETS.COCO_FORMAT = [folder.entry("pets")]
        register_datasets(cfg)
        assert MetadataCatalog.get("pets").thing_classes == classes
        assert str(folder.images) in DatasetCatalog.get("pets")[0]["file_name"]


def test_unused_declaration_needs_no_files(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), ["unused", "no.json", "nowhere"]]
    cfg.DATASETS.TEST = ("pets",)
    register_datasets(cfg)
    assert infer_num_classes(cfg) == 2


def test_unusable_boxes_are_dropped_but_the_file_is_evaluated_as_it_is(cfg, coco, tmp_path):
    coco.content["annotations"][0]["bbox"] = [70, 5, 10, 10]
    coco.content["annotations"][1]["bbox"] = [50, 30, 30, 30]
    coco.write()
    before = coco.json_file.read_bytes()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    register_datasets(cfg)
    records = DatasetCatalog.get("pets")
    assert [[a["bbox"] for a in r["annotations"]] for r in records] == [
        [[50, 30, 30, 30]],
        [[0, 0, 30, 50]],
        [],
    ]
    evaluator = COCOEvaluator("pets", output_dir=str(tmp_path))
    assert evaluator._coco_api.dataset == json.loads(before)
    assert coco.json_file.read_bytes() == before


def test_category_ids_with_gaps(cfg, coco):
    for entry in coco.content["categories"] + coco.content["annotations"]:
        key = "id" if "name" in entry else "category_id"
        entry[key] *= 10
    coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = ("pets",)
    register_datasets(cfg)
    assert infer_num_classes(cfg) == 2
    assert MetadataCatalog.get("pets").thing_dataset_id_to_contiguous_id == {10: 0, 20: 1}
    assert [a["category_id"] for a in DatasetCatalog.get("pets")[0]["annotations"]] == [0, 1]


def test_num_classes_contradicts(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = ("pets",)
    register_datasets(cfg)
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 2
    assert infer_num_classes(cfg) == 2
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 80
    with pytest.raises(UserError, match=r"NUM_CLASSES is 80, but .*'pets' has 2 classes \(cat, "):
        infer_num_classes(cfg)


def test_different_classes(cfg, coco, other_coco):
    other_coco.content["categories"].append({"id": 3, "name": "cow"})
    other_coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), other_coco.entry("farm")]
    for train, test in ((("pets", "farm"), ()), (("pets",), ("farm",))):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
        with pytest.raises(UserError, match=r"different classes: 2 \(cat, dog\) and 3 \(cat, dog,"):
            register_datasets(cfg)


def test_unknown_name_gets_a_suggestion(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets_train")]
    for key, name, near in (("TRAIN", "pets_trian", "pets_train"), ("TEST", "coco2017", "coco_2")):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
        cfg.DATASETS[key] = (name,)
        with pytest.raises(UserError, match=f"DATASETS.{key} names '{name}'.*did you mean {near}"):
            register_datasets(cfg)


def test_no_name_at_all(cfg):
    with pytest.raises(UserError, match="DATASETS.TRAIN and DATASETS.TEST are empty"):
        register_datasets(cfg)


@pytest.mark.parametrize("entry", ["pets", ["pets", "a.json"], ["pets", "a.json", 3], ["", "", ""]])
def test_malformed_declaration(cfg, entry):
    cfg.DATASETS.COCO_FORMAT = [entry]
    with pytest.raises(UserError, match="name, annotation file, image folder.* is expected"):
        register_datasets(cfg)


def test_declared_twice_or_taken(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), coco.entry("pets")]
    with pytest.raises(UserError, match="declares 'pets' twice"):
        register_datasets(cfg)
    cfg.DATASETS.COCO_FORMAT = [coco.entry("coco_2017_train")]
    with pytest.raises(UserError, match="'coco_2017_train', which is registered already"):
        register_datasets(cfg)


def test_wrong_paths_name_the_key(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [["pets", "no.json", str(coco.images)]]
    cfg.DATASETS.TRAIN = ("pets",)
    with pytest.raises(UserError, match="no.json does not exist; correct the path in DATASETS.COC"):
        register_datasets(cfg)


def test_missing_coco_names_the_environment_variable(cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    with pytest.raises(UserError, match="instances_train2017.json does not exist; .*DETECTRON2_DA"):
        register_datasets(cfg)


def test_builtin_data_set(cfg, coco):
    """One of Detectron2's own, with its 80 classes and their gaps, in its place on the disk."""
    ids = builtin._get_builtin_metadata("coco")["thing_dataset_id_to_contiguous_id"]
    names = builtin._get_builtin_metadata("coco")["thing_classes"]
    coco.content["categories"] = [
        {"id": i, "name": name} for i, name in zip(ids, names, strict=True)
    ]
    coco.content["annotations"][0]["category_id"] = 90
    coco.write()
    register_coco_instances(
        "coco_like_train",
        builtin._get_builtin_metadata("coco"),
        str(coco.json_file),
        str(coco.images),
    )
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("coco_like_train",)
    for _ in range(2):
        register_datasets(cfg)
        assert infer_num_classes(cfg) == 80
        first = DatasetCatalog.get("coco_like_train")[0]["annotations"]
        assert [a["category_id"] for a in first] == [79, 1]


def test_builtin_name_with_a_file_of_other_classes(cfg, coco):
    register_coco_instances(
        "coco_like_val",
        builtin._get_builtin_metadata("coco"),
        str(coco.json_file),
        str(coco.images),
    )
    cfg.DATASETS.TEST = ("coco_like_val",)
    with pytest.raises(UserError, match="has the classes cat, dog, but .*known to have person, bi"):
        register_datasets(cfg)


def test_data_set_registered_as_a_function(cfg):
    def load():
        MetadataCatalog.get("by_hand").thing_classes = ["a", "b", "c"]
        return []

    DatasetCatalog.register("by_hand", load)
    DatasetCatalog.register("by_hand_nameless", list)
    cfg.DATASETS.TRAIN = ("by_hand",)
    register_datasets(cfg)
    assert infer_num_classes(cfg) == 3
    cfg.DATASETS.TRAIN = ("by_hand_nameless",)
    register_datasets(cfg)
    with pytest.raises(UserError, match="'by_hand_nameless' has no class names"):
        infer_num_classes(cfg)
