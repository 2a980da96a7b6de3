"""Simple Korean: sentences about people with true particles, and tasks in Korean."""

from __future__ import annotations

from random import Random

from base.mini.dialogue import Turn
from base.mini.names import Split, is_held_out
from base.mini.words import listed

FREQUENT = (
    "가각간갈감갑값강같개거건걸것게겨격결경계고곡곧골공과관광교구국군권귀그극근글금급기긴길김까깨꺼께"
    "꼭꽃끝나난날남낮내너넌널네녀년노녹논놀농높누눈뉴는늘능니다단달담답당대더던데도독돈돌동되된두둘"
    "드든들등디따때떠또뜻라락란람랑래량러런럼레려력련로록론료루류르른를름리린림마만많말맛망매머먹먼"
    "메면명모목몰무문물미민밀바박밖반받발밤방배백버번벌법베벽변별병보복본봄부북분불비빛빠빨사산살삼상"
    "새색생서석선설섬성세센소속손송수순술숨쉬스습시식신실심싶싸쓰씨아악안알앞애야약양어언얼엄업없었에여"
    "역연열염영예오온올옷와완왜외요용우운울움원월위유육으은을음응의이인일임입있자작잔잘잠장재저적전절점"
    "정제조족존종좋좌죄주죽준중즐증지직진질집짓짜찍차착찬참창찾채책처천철첫청체초최추축출춤충치친칠카커"
    "코크키타탁태터토통트특파판팔편평포표품풍프피필하학한할함합항해햇행향허험현형호혼홀화확환활황회효후"
    "흐흰히힘"
)
_FAMILY = "김이박최정강조윤장임한오서신권황안송류홍"
_GIVEN = listed(
    "민수 지영 영희 철수 수진 현우 서연 지훈 하은 도윤 예린 준호 미나 태우 소라 은지 동현 유나 "
    "성민 가영 나래 다온 라희 보람 사랑 아름 재민 진아 하늘 혜원"
)
_PLACES = listed("서울 부산 대구 인천 광주 대전 울산 제주 수원 전주 강릉 속초 여수 춘천 경주 포항")
_FOODS = listed("밥 빵 사과 김치 국수 떡 우유 고기 생선 과일 라면 만두 포도 감자 딸기")
_JOBS = listed("의사 교사 농부 가수 요리사 화가 작가 기자 학생 군인 간호사 어부")
_ANIMALS = listed("개 고양이 말 소 새 토끼 오리 닭 양 거북이")
_WORDS = {
    "dog": "개", "cat": "고양이", "horse": "말", "cow": "소", "bird": "새", "rabbit": "토끼",
    "water": "물", "house": "집", "book": "책", "school": "학교", "friend": "친구", "day": "날",
    "night": "밤", "sea": "바다", "mountain": "산", "tree": "나무", "flower": "꽃", "bread": "빵",
    "milk": "우유", "apple": "사과", "doctor": "의사", "teacher": "교사", "farmer": "농부",
    "red": "빨강", "blue": "파랑", "white": "하양", "rain": "비", "snow": "눈", "love": "사랑",
    "time": "시간", "hand": "손", "moon": "달", "star": "별", "road": "길", "child": "아이",
}  # fmt: skip


def _closed(word: str) -> bool:
    """Whether the last syllable ends in a consonant (that decides the particle's form)."""
    return (ord(word[-1]) - 0xAC00) % 28 != 0


def _topic(word: str) -> str:
    return word + ("은" if _closed(word) else "는")


def _object(word: str) -> str:
    return word + ("을" if _closed(word) else "를")


def _name(rng: Random, split: Split) -> str:
    while True:
        name = rng.choice(_FAMILY) + rng.choice(_GIVEN)
        if is_held_out(name) == (split == "held_out"):
            return name


def _fact(rng: Random, name: str) -> tuple[str, str, str]:
    """A sentence about a person, a question on it, the answer."""
    topic = _topic(name)
    place, food, job, animal = (rng.choice(g) for g in (_PLACES, _FOODS, _JOBS, _ANIMALS))
    age = str(rng.randint(5, 80))
    return rng.choice(
        (
            (f"{topic} {place}에 삽니다.", f"{topic} 어디에 삽니까?", place),
            (f"{topic} {_object(food)} 좋아합니다.", f"{topic} 무엇을 좋아합니까?", food),
            (f"{name}의 직업은 {job}입니다.", f"{name}의 직업은 무엇입니까?", job),
            (f"{topic} {_object(animal)} 키웁니다.", f"{topic} 무엇을 키웁니까?", animal),
            (f"{topic} {age}살입니다.", f"{topic} 몇 살입니까?", age),
        )
    )


def answer(rng: Random, split: Split, difficulty: float) -> Turn:
    """A question on a Korean passage about one or more people."""
    names: list[str] = []
    for _ in range(rng.randint(1, 2 + round(2 * difficulty))):
        name = _name(rng, split)
        names += [] if name in names else [name]
    facts = [_fact(rng, name) for name in names]
    _, asked, found = rng.choice(facts)
    text = " ".join(fact[0] for fact in facts)
    return Turn(rng.choice(("{}\n\n{}", "글: {}\n질문: {}", "{}\n{}")).format(text, asked), found)


def copy(rng: Random, split: Split, difficulty: float) -> Turn:
    text = _fact(rng, _name(rng, split))[0]
    if rng.random() < 0.5:
        text = " ".join(
            "".join(rng.choices(FREQUENT, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))
        )
    return Turn(f"{rng.choice(('따라 하세요', '그대로 쓰세요', 'Repeat'))}: {text}", text)


def word(rng: Random, split: Split, difficulty: float) -> Turn:
    english, korean = rng.choice(list(_WORDS.items()))
    return rng.choice(
        (
            Turn(f"What is {english} in Korean?", korean),
            Turn(f"What is {korean} in English?", english),
            Turn(f"{korean}의 영어는 무엇입니까?", english),
        )
    )


def story(rng: Random, split: Split) -> str:
    """A few true sentences about one person."""
    name = _name(rng, split)
    told = list(dict.fromkeys(_fact(rng, name)[0] for _ in range(rng.randint(2, 5))))
    return " ".join(told) + rng.choice(("", " 오늘은 날씨가 좋습니다.", " 그래서 모두 즐겁습니다."))


def syllables(rng: Random) -> str:
    """Frequent syllables in random order, so that the tokenizer learns each as one token."""
    found = rng.sample(FREQUENT, 60)
    return " ".join("".join(found[i : i + rng.randint(1, 2)]) for i in range(0, 60, 2))
