"""The label trie by hand, and the label words that can't be told apart."""

import pytest
import sentencepiece
import torch

from launcher.errors import InputError
from prompting.labels import LabelTrie, build_trie, label_words, prefix_pairs
from prompting.pangu import PanguTokenizer
from prompting.template import encode_pieces

# Words:          a        a b      a b c        a d     e
WORDS = ((10,), (10, 11), (10, 11, 12), (10, 13), (14,))


def test_trie_by_hand():
    trie = LabelTrie(WORDS, (0, 1, 2, 3, 4))
    assert trie.fed == [(10,), (10, 11)]  # what nothing follows is not fed
    assert trie.tokens == [10, 11]
    assert trie.depths == [1, 2]
    assert trie.ancestors.tolist() == [[True, False], [True, True]]
    assert trie.edges == [(0, 10), (0, 14), (1, 11), (1, 13), (2, 12)]
    assert trie.steps.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1],
        [1, 0, 0, 1, 0],
        [0, 1, 0, 0, 0],
    ]
    assert trie.lengths.tolist() == [1, 2, 3, 2, 1]


def test_branches_do_not_see_each_other():
    """The same token behind two parents is two nodes, and a repeated one is its own child."""
    trie = LabelTrie(((1, 5, 9), (2, 5, 9), (5, 5, 5)), (0, 1, 2))
    assert trie.fed == [(1,), (2,), (5,), (1, 5), (2, 5), (5, 5)]
    assert trie.tokens == [1, 2, 5, 5, 5, 5]
    assert trie.ancestors.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1],
    ]
    assert trie.edges == [(0, 1), (0, 2), (0, 5), (1, 5), (2, 5), (3, 5), (4, 9), (5, 9), (6, 5)]
    assert trie.steps.sum(1).tolist() == [3, 3, 3]


def test_labels_of_one_token_feed_nothing():
    trie = LabelTrie(((10,), (11,)), (0, 1))
    assert (trie.fed, trie.tokens, trie.depths) == ([], [], [])
    assert trie.ancestors.shape == (0, 0)
    assert trie.edges == [(0, 10), (0, 11)]


def test_words_of_a_label_add_up():
    trie = LabelTrie(((10,), (11,), (12,)), (0, 1, 1))
    p = torch.tensor([[0.5, 0.2, 0.1], [0.1, 0.0, 0.3]])
    torch.testing.assert_close(
        trie.per_label(p.log()).exp(), torch.tensor([[0.5, 0.3], [0.1, 0.3]])
    )


def test_prefix_pairs():
    assert prefix_pairs(LabelTrie(WORDS, (0, 1, 2, 3, 4))) == [(0, 1), (0, 2), (0, 3), (1, 2)]
    assert prefix_pairs(LabelTrie(((1, 2), (2, 1), (1, 3)), (0, 1, 2))) == []


def test_label_words():
    labels = ["动画", "影视"]
    assert label_words(labels, {}) == [("动画",), ("影视",)]
    assert label_words(labels, {"影视": "电影"}) == [("动画",), ("电影",)]
    assert label_words(labels, {"动画": ["动漫", "动画"]}) == [("动漫", "动画"), ("影视",)]


def test_a_verbalizer_for_no_label_is_refused():
    with pytest.raises(InputError) as raised:
        label_words(["动画", "影视"], {"音乐": "歌"})
    assert str(raised.value) == ("prompt.verbalizer: '音乐' is no label; the labels are 动画, 影视")


@pytest.mark.parametrize("words", ["", " ", [], ["动漫", "\n"]])
def test_empty_words_are_refused(words):
    with pytest.raises(InputError, match="label '动画' has an empty word"):
        label_words(["动画"], {"动画": words})


def test_build_trie_keeps_the_words_in_order():
    trie = build_trie([("a", "ab"), ("c",)], [[[1], [1, 2]], [[3]]], unknown_id=0)
    assert trie == LabelTrie(((1,), (1, 2), (3,)), (0, 0, 1))


def test_words_the_vocabulary_cannot_tell_apart_are_all_told():
    with pytest.raises(InputError) as raised:
        build_trie(
            [("动画", "动漫"), ("影视",), ("鬼畜",), ("空",)],
            [[[5], [6, 7]], [[6, 7]], [[8, 0]], [[]]],
            unknown_id=0,
        )
    lines = str(raised.value).split("\n")
    assert len(lines) == 3
    assert all(line.startswith("prompt.verbalizer: the label word") for line in lines)
    assert "'动漫' and '影视' have the same ids [6, 7]" in lines[0]
    assert "'鬼畜' has the unknown id 0 in its ids [8, 0]" in lines[1]
    assert "'空' has no ids []" in lines[2]


def test_without_an_unknown_id_every_id_is_known():
    assert build_trie([("a",)], [[[0]]], unknown_id=None).words == ((0,),)


def test_the_study_s_labels_in_the_real_vocabulary(reference_data):
    """音乐舞蹈 is one word to the segmenter, so three ids: 音乐, 舞, 蹈, and not 舞蹈's own."""
    vocabulary = reference_data / "vocab/pangu_vocab.model"
    names = ["动画", "音乐舞蹈", "知识", "生活", "影视"]
    ids = encode_pieces(PanguTokenizer(vocabulary), names)
    assert ids == [[6431], [1590, 2731, 27973], [1293], [282], [4376]]
    pieces = sentencepiece.SentencePieceProcessor(str(vocabulary))
    assert pieces.encode(names) == ids
    assert pieces.encode("音乐 舞蹈") == [1590, 6837]
    trie = build_trie([(name,) for name in names], [[own] for own in ids], unknown_id=0)
    assert trie.fed == [(1590,), (1590, 2731)]
    assert prefix_pairs(trie) == []
