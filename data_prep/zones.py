"""The zones of the study (2021) and how it grouped them into main categories, as data."""

from collections.abc import Mapping, Sequence

import numpy as np

FIRST_LEVEL_ZONES: tuple[str, ...] = (
    "动画",
    "番剧",
    "国创",
    "音乐",
    "舞蹈",
    "游戏",
    "知识",
    "科技",
    "运动",
    "汽车",
    "生活",
    "美食",
    "动物圈",
    "鬼畜",
    "时尚",
    "资讯",
    "娱乐",
    "影视",
    "纪录片",
    "电影",
    "电视剧",
)

MAIN_CATEGORIES: dict[str, list[str]] = {
    "动画": ["动画", "番剧", "国创", "游戏", "鬼畜"],
    "音乐舞蹈": ["音乐", "舞蹈"],
    "知识": ["知识", "科技"],
    "生活": ["运动", "汽车", "生活", "美食", "动物圈", "时尚", "资讯", "娱乐"],
    "影视": ["影视", "电影", "电视剧", "纪录片"],
}


def group_distribution(
    shares: np.ndarray, names: Sequence[str], grouping: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Sum the shares of each group's members, as the study does for its five main categories.

    `shares` is [..., len(names)]; the result [..., len(grouping)] has its dtype and the order of
    `grouping`. Raises ValueError unless `grouping` has every name exactly once.
    """
    members = [member for group in grouping.values() for member in group]
    if sorted(members) != sorted(names):
        raise ValueError(f"grouping has {members}, expected each of {list(names)} exactly once")
    columns = [[names.index(member) for member in group] for group in grouping.values()]
    return np.stack([shares[..., column].sum(axis=-1) for column in columns], axis=-1)
