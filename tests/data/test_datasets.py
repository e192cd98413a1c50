"""Data sets out of the configuration."""

import logging

from ddetr_d2.data import (
    coco_set,
    data_set_classes,
    infer_num_classes,
    load_records,
    register_datasets,
)
from ddetr_d2.errors import UserError

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import builtin, register_coco_instances


def test_own_data_set(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    for _ in range(2):
        assert register_datasets(cfg) == ["cat", "dog"]
        assert MetadataCatalog.get("pets").thing_classes == ["cat", "dog"]
        records = get_detection_dataset_dicts(("pets",), filter_empty=False)
        assert [len(r["annotations"]) for r in records] == [2, 1, 0]
        assert records == load_records("pets")


def test_declared_on_the_command_line(cfg, coco):
    name, json_file, images = coco.entry("pets")
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[['{name}', '{json_file}', '{images}']]"])
    cfg.merge_from_list(["DATASETS.TRAIN", "('pets',)"])
    assert len(register_datasets(cfg)) == 2


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
    assert len(register_datasets(cfg)) == 2


def test_unusable_boxes_are_left_out_of_training_and_evaluation(cfg, coco, caplog):
    coco.content["annotations"][0]["bbox"] = [70, 5, 10, 10]
    coco.content["annotations"][1]["bbox"] = [50, 30, 30, 30]
    coco.write()
    before = coco.json_file.read_bytes()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    register_datasets(cfg)
    kept = [[50, 30, 30, 30], [0, 0, 30, 50]]
    assert [a["bbox"] for r in load_records("pets") for a in r["annotations"]] == kept
    assert [a["bbox"] for a in coco_set("pets").annotations.as_coco()["annotations"]] == kept
    assert "1 of 3 boxes is left out of training and evaluation" in caplog.text
    assert coco.json_file.read_bytes() == before


def test_category_ids_with_gaps(cfg, coco):
    for entry in coco.content["categories"] + coco.content["annotations"]:
        key = "id" if "name" in entry else "category_id"
        entry[key] *= 10
    coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = ("pets",)
    assert register_datasets(cfg) == ["cat", "dog"]
    assert coco_set("pets").category_ids == [10, 20]
    assert [a["category_id"] for a in load_records("pets")[0]["annotations"]] == [0, 1]


def test_num_classes_contradicts(cfg):
    assert infer_num_classes(cfg, ["cat", "dog"]) == 2
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 2
    assert infer_num_classes(cfg, ["cat", "dog"]) == 2
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 80
    with pytest.raises(UserError, match=r"NUM_CLASSES is 80, but there are 2 classes \(cat, dog"):
        infer_num_classes(cfg, ["cat", "dog"])


def rename(coco, *names, first_id=1):
    """Give the categories of the set other names and numbers; boxes keep their positions."""
    coco.content["categories"] = [
        {"id": first_id + index, "name": name} for index, name in enumerate(names)
    ]


def test_training_sets_are_joined_by_name(cfg, coco, other_coco, caplog):
    rename(other_coco, "cow", "cat")
    other_coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), other_coco.entry("farm")]
    cfg.DATASETS.TRAIN = ("pets", "farm")
    assert register_datasets(cfg) == ["cat", "dog", "cow"]
    assert coco_set("farm").category_ids == [2, None, 1]
    assert [a["category_id"] for a in load_records("farm")[0]["annotations"]] == [2, 0]
    assert "lacks 1 of the 3 classes: dog. Where its images show them" in caplog.text
    assert coco_set("pets").category_ids == [1, 2, None]


def test_test_set_with_other_ids_and_order(cfg, coco, other_coco, caplog):
    """The same names otherwise numbered, in other case or spacing: one class."""
    rename(other_coco, "DOG", " cat ", first_id=7)
    for annotation, category in zip(other_coco.content["annotations"], (8, 7, 7), strict=True):
        annotation["category_id"] = category
    other_coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), other_coco.entry("test")]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("pets",), ("test",)
    assert register_datasets(cfg) == ["cat", "dog"]
    assert coco_set("test").category_ids == [8, 7]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_test_set_that_lacks_a_class_and_has_one_more(cfg, coco, other_coco, caplog):
    rename(other_coco, "dogs", "cat")
    other_coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets"), other_coco.entry("test")]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("pets",), ("test",)
    with caplog.at_level(logging.INFO, logger="ddetr_d2"):
        assert register_datasets(cfg) == ["cat", "dog"]
    assert coco_set("test").category_ids == [2, None]
    assert "lacks 1 of the model's 2 classes, which does not count in its AP: dog." in caplog.text
    assert "has 1 classes that the model does not have" in caplog.text
    assert "dogs; did you mean dog?" in caplog.text


def test_the_classes_of_the_weights_come_first(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TEST = ("pets",)
    assert register_datasets(cfg, ["cow", "dog", "cat"]) == ["cow", "dog", "cat"]
    assert coco_set("pets").category_ids == [None, 2, 1]
    assert MetadataCatalog.get("pets").thing_classes == ["cow", "dog", "cat"]


def test_no_class_in_common(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TEST = ("pets",)
    with pytest.raises(UserError, match="no class in common: the set has cat, dog, .* bus, car"):
        register_datasets(cfg, ["bus", "car"])


def test_crowds_as_objects(cfg, coco):
    for annotation in coco.content["annotations"]:
        annotation["iscrowd"] = 1
    coco.write()
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = ("pets",)
    with pytest.raises(
        UserError, match=r"all annotations \(3\) are of crowds .*CROWDS_ARE_OBJECTS"
    ):
        register_datasets(cfg)
    cfg.DATASETS.CROWDS_ARE_OBJECTS = True
    register_datasets(cfg)
    assert coco_set("pets").annotations.objects_per_image().tolist() == [2, 1, 0]


def test_class_names_without_images(cfg, coco):
    cfg.DATASETS.COCO_FORMAT = [[*coco.entry("pets")[:2], "no/such/folder"]]
    cfg.DATASETS.TRAIN = ("pets",)
    assert data_set_classes(cfg) == ["cat", "dog"]
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    assert len(data_set_classes(cfg)) == 80
    cfg.DATASETS.TRAIN = ()
    assert data_set_classes(cfg) is None


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
        assert len(register_datasets(cfg)) == 80
        first = load_records("coco_like_train")[0]["annotations"]
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
    assert register_datasets(cfg) == ["a", "b", "c"]
    assert load_records("by_hand") == []
    cfg.DATASETS.TRAIN = ("by_hand_nameless",)
    with pytest.raises(UserError, match="'by_hand_nameless' has no class names"):
        register_datasets(cfg)
