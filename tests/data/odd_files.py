"""Odd annotation files as a whole, and odd names and places of image files."""

import gzip
import io
import json
import os
import unicodedata
import zipfile

from odd_input import SIZES, Data, kind

# --- the annotation file -----------------------------------------------------------------------


@kind()
def byte_order_mark(data):
    """Windows editors, PowerShell."""
    data.text = json.dumps(data.content).encode("utf-8-sig")


@kind()
def utf_16(data):
    """PowerShell's > ."""
    data.text = json.dumps(data.content).encode("utf-16")


@kind()
def pretty_printed_with_windows_line_ends(data):
    data.text = json.dumps(data.content, indent=4).replace("\n", "\r\n") + "\r\n\r\n"


@kind()
def keys_twice_in_an_object(data):
    """The last one counts, as in every reader of JSON."""
    data.text = json.dumps(data.content).replace('"id": 1,', '"id": 99, "id": 1,')


@kind()
def numbers_beyond_the_range_of_floats(data):
    data.content["info"] = {"scale": "HUGE"}
    data.text = json.dumps(data.content).replace('"HUGE"', "1e400")


@kind(refused="no JSON: .* is no text in UTF-8")
def latin_1(data):
    data.content["categories"][0]["name"] = "Käse"
    data.text = json.dumps(data.content, ensure_ascii=False).encode("latin-1")


@kind(refused="no JSON: Illegal trailing comma|no JSON: Expecting")
def trailing_comma(data):
    """Written by hand."""
    data.text = json.dumps(data.content)[:-1] + ",}"


@kind(refused="no JSON: Expecting")
def comments(data):
    data.text = "// my data\n" + json.dumps(data.content)


@kind(refused="no JSON: Expecting property name enclosed in double quotes in line 1")
def single_quotes(data):
    """str(dict) of Python in the place of json.dumps."""
    data.text = repr(data.content)


@kind(refused="no JSON: Extra data in line 2")
def json_lines(data):
    data.text = "\n".join(json.dumps(row) for row in data.content["images"])


@kind(refused="no JSON: Extra data")
def two_files_one_behind_the_other(data):
    """cat a.json b.json"""
    data.text = json.dumps(data.content) * 2


@kind(refused="no JSON: ")
def cut_short(data):
    """A disk that was full, a download that broke off."""
    data.text = json.dumps(data.content)[:300]


@kind(refused="the annotation file is empty")
def empty_file(data):
    data.text = ""


@kind(refused="no JSON: ")
def gzip_file(data):
    data.text = gzip.compress(json.dumps(data.content).encode())


@kind(refused="no JSON: ")
def zip_file(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("instances.json", json.dumps(data.content))
    data.text = buffer.getvalue()


@kind(refused="no JSON: Expecting value in line 1, column 1")
def pointer_of_git_lfs(data):
    data.text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@kind(refused="no JSON: Expecting value in line 1, column 1")
def page_of_a_web_server(data):
    data.text = "<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"


@kind(refused="no JSON: Expecting value in line 1, column 1")
def pascal_voc(data):
    data.text = "<annotation><filename>a.jpg</filename></annotation>"


@kind(refused="no JSON: Extra data in line 1")
def yolo(data):
    data.text = "0 0.5 0.5 0.1 0.2\n"


@kind(refused="nested too deeply")
def nested_without_end(data):
    data.text = '{"images": ' + "[" * 100_000 + "]" * 100_000 + "}"


@kind(refused="a list of detections")
def results_of_a_detector(data):
    data.text = json.dumps([row | {"score": 0.5} for row in data.content["annotations"]])


@kind(refused="in another format of annotations: export as COCO")
def label_studio_json(data):
    data.text = json.dumps([{"id": 1, "data": {"image": "/data/a.jpg"}, "annotations": []}])


@kind(refused="LabelMe's file of one image")
def labelme_json(data):
    data.text = json.dumps({"version": "5.0", "shapes": [], "imagePath": "a.jpg"})


@kind(refused="a project of the VGG Image Annotator")
def via_project(data):
    data.text = json.dumps({"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}})


@kind(refused="a project of the VGG Image Annotator")
def via_json(data):
    data.text = json.dumps({"a.jpg99": {"filename": "a.jpg", "size": 99, "regions": []}})


@kind(refused="no COCO instances file, but Datumaro's own format")
def datumaro_json(data):
    data.text = json.dumps({"info": {}, "categories": {"label": {"labels": []}}, "items": []})


@kind(refused="no COCO instances file, it has no 'categories'")
def captions(data):
    """COCO's file of captions."""
    del data.content["categories"]


@kind(refused="annotation file .* does not exist; correct the path in DATASETS.COCO_FORMAT")
def no_annotation_file(data):
    data.json_file = data.root / "annotation.json"
    data.json_file.symlink_to(data.root / "nowhere.json")


@kind(refused="annotation file .* does not exist")
def folder_in_the_place_of_the_annotation_file(data):
    data.json_file.mkdir()


# --- image files --------------------------------------------------------------------------------


def move(data: Data, file_name: str) -> None:
    """Give the file of the first image another name, and not its row."""
    path = data.images / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    (data.images / "a.jpg").rename(path)


WRITTEN_OTHERWISE = "image files were found under a name written in another way: 1"


@kind(said=WRITTEN_OTHERWISE)
def windows_path(data):
    move(data, "sub/a.jpg")
    data.rename("sub\\a.jpg")


@kind(said=WRITTEN_OTHERWISE)
def path_of_a_windows_computer(data):
    data.rename("C:\\Users\\me\\Desktop\\images\\a.jpg")


@kind(said=WRITTEN_OTHERWISE)
def path_of_another_computer(data):
    data.rename("/home/me/project/images/a.jpg")


@kind()
def path_of_this_computer(data):
    data.rename(str(data.images / "a.jpg"))


@kind(said=WRITTEN_OTHERWISE)
def folder_of_its_own_in_front(data):
    """CVAT, COCO Annotator."""
    data.rename("images/a.jpg")


@kind()
def dot_in_front(data):
    data.rename("./a.jpg")


@kind(said=WRITTEN_OTHERWISE)
def percent_escapes(data):
    """Label Studio."""
    move(data, "my image (1).jpg")
    data.rename("my%20image%20%281%29.jpg")


@kind(said=WRITTEN_OTHERWISE)
def address_of_label_studio(data):
    data.rename("/data/local-files/?d=project/a.jpg")


@kind(said=WRITTEN_OTHERWISE)
def address_of_a_web_server(data):
    data.rename("https://example.org/files/a.jpg")


@kind(said=WRITTEN_OTHERWISE)
def unicode_form_of_a_mac(data):
    move(data, unicodedata.normalize("NFD", "Käse.jpg"))
    data.rename(unicodedata.normalize("NFC", "Käse.jpg"))


@kind(said=WRITTEN_OTHERWISE)
def other_case(data):
    """Cameras write .JPG; Windows does not mind."""
    data.rename("A.JPG")


@kind(said=WRITTEN_OTHERWISE)
def space_behind_the_name(data):
    """A spreadsheet."""
    data.rename("a.jpg ")


@kind()
def odd_characters_in_a_name(data):
    move(data, "a\n'\" %41#?.jpg")
    data.rename("a\n'\" %41#?.jpg")


@kind()
def folders_of_images(data):
    move(data, "1/2/a.jpg")
    data.rename("1/2/a.jpg")


@kind()
def linked_folder(data):
    data.images.rename(data.root / "store")
    data.images.symlink_to(data.root / "store", target_is_directory=True)


@kind()
def linked_images(data):
    for name in SIZES:
        (data.images / name).rename(data.root / name)
        (data.images / name).symlink_to(data.root / name)


@kind(said=WRITTEN_OTHERWISE)
def links_in_a_circle(data):
    for name in ("x", "y", "z"):
        (data.images / name).mkdir()
        (data.images / name / "up").symlink_to(data.images, target_is_directory=True)
    data.rename("elsewhere/a.jpg")


@kind(refused="1 of 2 image files .*: a.jpg")
def broken_link(data):
    (data.images / "a.jpg").unlink()
    (data.images / "a.jpg").symlink_to(data.root / "nowhere.jpg")


@kind(refused="1 of 2 image files is missing from the image folder .*: a.jpg")
def missing_image(data):
    (data.images / "a.jpg").unlink()


@kind(refused="2 of 2 image files are missing from the image folder .*: a.jpg, b.png")
def images_still_in_the_archive(data):
    with zipfile.ZipFile(data.images / "images.zip", "w") as archive:
        for name in SIZES:
            archive.write(data.images / name, name)
            (data.images / name).unlink()


@kind(refused="image folder .* does not exist; correct the path in DATASETS.COCO_FORMAT")
def missing_folder(data):
    data.image_root = data.root / "image"


@kind(refused="image folder .* does not exist")
def folder_that_is_a_file(data):
    data.image_root = data.images / "a.jpg"


@kind(refused="2 of 3 image files are missing")
def flattened_folders(data):
    """Two images of one name, of which the second was written over the first."""
    data.rename("morning/a.jpg")
    data.content["images"].append({"id": 3, "file_name": "evening/a.jpg"})


@kind(refused="1 of 2 image files is missing .*: 'no\\\\nsuch.jpg'")
def missing_image_whose_name_has_a_line_end(data):
    data.rename("no\nsuch.jpg")


@kind()
def relative_paths(data):
    data.json_file = data.json_file.parent / os.curdir / "images" / os.pardir / "annotations.json"
