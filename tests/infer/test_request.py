import pytest

from xseg.errors import UserError
from xseg.infer.request import categories, phrase, read


@pytest.mark.parametrize(
    ("typed", "phrases"),
    [
        ("the large red circle", ("the large red circle",)),
        ("Segment the Red circle.", ("the red circle",)),
        ("please find a square in the image", ("a square",)),
        ("Can you segment the circle?", ("the circle",)),
        ("show me the  blue star!", ("the blue star",)),
        ("segment: circle, Square,grass, circle", ("circle", "square", "grass")),
        ("where is <p>the moon</p>? And <p>the sun</p>?", ("the moon", "the sun")),
        ("how many circles are there?", ()),
        ("Describe the image.", ()),
        ("the red one, is it a circle?", ()),
    ],
)
def test_free_text_is_understood(typed: str, phrases: tuple[str, ...]) -> None:
    found = read(typed)
    assert found.phrases == phrases
    for named in phrases:
        assert f"<p>{named}</p>" in found.text
    if "<p>" in typed or not phrases:
        assert found.text == typed


@pytest.mark.parametrize("typed", ["", "   ", "segment: , ,", "what is <image>?", "<SEG>", "..."])
def test_what_cannot_be_a_message_is_refused(typed: str) -> None:
    with pytest.raises(UserError):
        read(typed)


@pytest.mark.parametrize("name", ["<image> star", "the <region> thing", "a <SEG>", "<p>star", "star</p>", 3, None])
def test_names_hold_no_token_of_the_model(name: object) -> None:
    for ask in (phrase, lambda text: categories(["star", text])):
        with pytest.raises(UserError, match=r"only xseg itself|no text"):
            ask(name)


def test_wording_is_that_of_evaluation() -> None:
    from xseg.tasks import phrasing

    assert read("a circle").text == phrasing.PHRASE[0].format(phrase="<p>a circle</p>")
    assert read("segment: a, b").text == phrasing.CATEGORIES[0].format(names="<p>a</p>, <p>b</p>")


def test_a_vocabulary_says_which_names_are_regions() -> None:
    found = read("INS: Circle, star; sem: grass")
    assert found.phrases == ("circle", "star", "grass") and found.regions == (2,)
    assert found.text == read("segment: circle, star, grass").text and read("segment: a, b").regions is None
    assert read("ins: circle").regions == ()
    with pytest.raises(UserError, match="did you mean 'ins'"):
        read("sem: grass; inst: circle")
