"""Classes are the same where people would say so, and nowhere else."""

import unicodedata

from ddetr_d2.class_names import listed, match_classes

import pytest


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("cat", "cat"),
        ("cat", "Cat"),
        ("traffic light", "traffic_light"),
        ("traffic light", "Traffic  Light "),
        ("traffic_light", "TRAFFIC LIGHT"),
        ("Straße", "STRASSE"),
        ("ﬁre", "fire"),
        ("１", "1"),
        *[
            (unicodedata.normalize(a, "Käse"), unicodedata.normalize(b, "käse"))
            for a, b in (("NFC", "NFD"), ("NFD", "NFC"))
        ],
        ("猫", "猫"),
    ],
)
def test_same(ours, theirs):
    assert match_classes([ours], ["other", theirs]) == [1]
    assert match_classes(["other", theirs], [ours]) == [None, 0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("cat", "cats"), ("cat", "dog"), ("cat", ""), ("a b", "ab"), ("猫", "犬"), ("e", "é")],
)
def test_different(ours, theirs):
    assert match_classes([ours], [theirs]) == [None]


def test_order_and_number_do_not_matter():
    assert match_classes(["a", "b", "c"], ["c", "x", "a"]) == [2, None, 0]
    assert match_classes([], ["a"]) == [] and match_classes(["a"], []) == [None]


def test_names_that_are_told_apart_by_their_case():
    """Characters, for example: each only matches its equal."""
    assert match_classes(["a", "A"], ["A", "a"]) == [1, 0]
    assert match_classes(["a", "A"], ["a", "b"]) == [0, None]
    assert match_classes(["A"], ["a", "A"]) == [1]
    assert match_classes(["traffic light"], ["Traffic Light", "TRAFFIC LIGHT"]) == [None]


def test_no_class_is_matched_twice():
    for ours in (["Cat", "cat"], ["cat", "CAT", "Cat"], ["cat_1", "cat 1"]):
        for theirs in (["cat"], ["CAT"], ["Cat", "dog"], ["Cat 1"]):
            found = [match for match in match_classes(ours, theirs) if match is not None]
            assert len(found) == len(set(found))


def test_equal_name_goes_before_a_similar_one():
    assert match_classes(["Cat"], ["cat", "Cat"]) == [1]


def test_listed():
    assert listed(["a", "b"]) == "a, b" and listed([]) == ""
    assert listed(list("abcdefghij")) == "a, b, c, d, e, f, g, h, i, j"
    assert listed(list("abcdefghijk")) == "a, b, c, d, e, f, g, h, i, j, ..."
