"""Category names of the simulated world: (Chinese, English), as in item_features.csv. Paths are unique,
single names are not."""

EMPTY = ("空", "empty")


def _pairs(text: str) -> list[tuple[str, str]]:
    words = text.split()
    return list(zip(words[::2], words[1::2], strict=True))


FIRSTS = _pairs(
    """
    搞笑 Funny 美食 Food 音乐 Music 游戏 Games 体育 Sports 旅行 Travel 宠物 Pets 时尚 Fashion 汽车 Cars
    科技 Technology 教育 Education 影视 Movies 舞蹈 Dance 健康 Health 家居 Home 亲子 Parenting 农业 Farming
    手工 Crafts 历史 History 科学 Science 摄影 Photography 户外 Outdoors 艺术 Art 财经 Finance
    """
)
SECONDS = _pairs(
    """
    教程 lessons 日常 diary 评测 reviews 现场 live 合集 collections 挑战 challenges 故事 stories 新闻 news
    访谈 interviews 幕后 backstage 技巧 tricks 盘点 rankings
    """
)
THIRDS = _pairs(
    """
    入门 beginner 经典 classic 街头 street 家庭 family 专业 professional 校园 campus 乡村 village 城市 city
    复古 retro 创意 creative 迷你 mini 极限 extreme
    """
)
THEMES = _pairs(
    """
    春季 spring 夜晚 night 周末 weekend 节日 festival 清晨 morning 冬季 winter
    """
)


def second_names(first: int, second: int) -> tuple[str, str]:
    return FIRSTS[first][0] + SECONDS[second][0], f"{FIRSTS[first][1]} {SECONDS[second][1]}"


def third_names(second: int, third: int) -> tuple[str, str]:
    return THIRDS[third][0] + SECONDS[second][0], f"{THIRDS[third][1]} {SECONDS[second][1]}"


def fourth_names(third: int, theme: int) -> tuple[str, str]:
    return THEMES[theme][0] + THIRDS[third][0], f"{THEMES[theme][1]} {THIRDS[third][1]}"
