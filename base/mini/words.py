"""Common words that the generated text draws its values from."""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """The words of a text; long lists read better so."""
    return tuple(text.split())


JOBS = listed(
    "baker builder carpenter cook dancer dentist doctor driver farmer fisher gardener guard guide "
    "hunter judge lawyer librarian mechanic miller miner musician nurse painter pilot plumber poet "
    "porter potter printer sailor shepherd singer smith tailor teacher waiter weaver writer"
)
FOODS = listed(
    "apples bananas beans bread butter cabbage cake carrots cheese cherries chocolate corn dates "
    "eggs figs fish grapes honey jam lemons melons milk mushrooms noodles nuts olives onions "
    "oranges pasta peaches pears peas pepper pie plums potatoes rice salad soup spinach tomatoes"
)
ANIMALS = listed(
    "bear bird camel cat chicken cow crow deer dog donkey duck fox frog goat goose hamster hen "
    "horse lamb lizard mouse mule parrot pig pony rabbit rat sheep snake swan tiger turtle wolf"
)
COLOURS = listed("black blue brown green grey gold orange pink purple red silver white yellow")
INSTRUMENTS = listed(
    "banjo bell cello clarinet cornet drum fiddle flute guitar harp horn lute piano trumpet viola "
    "violin whistle"
)
SUBJECTS = listed(
    "art biology botany chemistry dance drama geography geology history law logic medicine music "
    "painting physics poetry sculpture"
)
OBJECTS = listed(
    "bag ball basket bell blanket book bottle bowl box brush bucket button candle chair clock coat "
    "coin cup desk door flag fork glove hammer hat jar kettle key knife ladder lamp letter map "
    "mirror needle pan pen pencil picture plate ring rope scarf shirt shoe spoon stone table "
    "ticket toy watch wheel window"
)
VEHICLES = listed("bicycle boat bus car cart lorry motorbike scooter taxi tractor train truck van")
ROOMS = listed(
    "attic barn bathroom bedroom cellar church garage garden hall kitchen library office school "
    "shed shop stable station tower workshop yard"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed(
    "January February March April May June July August September October November December"
)
NUMBERS = listed("zero one two three four five six seven eight nine ten")
ORDINALS = listed("first second third fourth fifth sixth seventh eighth")
VERBS = listed(
    "asks brings builds buys calls carries cleans closes draws drops finds fixes gets gives hides "
    "holds keeps leaves likes loses makes moves needs opens paints pulls pushes sees sells sends "
    "shows takes throws wants washes watches"
)
ACTIONS = listed(
    "admire ask bring build buy call carry check clean close collect count cover cut describe draw "
    "drop explain find fix follow guard help hide hold ignore invent keep lift like lose love make "
    "mend miss move need offer open order own paint plan praise protect pull push read remember "
    "repair rent sell send show steal study test throw trust use visit want warn wash watch write"
)
RESTS = listed("camp eat hide play read rest sing sit sleep stand study train wait walk work")
NEAR = listed("at behind beside in near on under")


def third(verb: str) -> str:
    """The verb as it stands after a name: she carries, he watches."""
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("ch", "sh", "x", "ss")) else "s")


NOUNS = listed(
    "air beach boy bridge brother child city cloud daughter day evening father field fire floor "
    "flower forest friend game girl grass hand hill house ice island lake leaf light man market "
    "moon morning mother mountain night paper park path place plan rain river road roof sand sea "
    "sister sky snow son song star storm street summer sun town tree village wall water wind "
    "winter woman world year"
)
ADJECTIVES = listed(
    "bright broken busy cheap clean clear cold cool dark deep dirty dry early empty fast full hard "
    "heavy high hot large late light little long loud low new old open poor quick quiet rich round "
    "sharp short slow small soft strong tall thick thin tired warm weak wet wide wild young"
)

GOOD = listed(
    "amazing beautiful brilliant charming cheerful delicious delightful excellent fantastic "
    "friendly fresh fun good gorgeous great happy helpful kind lovely nice perfect pleasant "
    "splendid superb tasty wonderful"
)
BAD = listed(
    "angry awful bad bitter boring broken cruel dirty disgusting dreadful dull horrible mean nasty "
    "painful poor rotten rude sad slow stale terrible ugly unfair useless weak"
)
TOPICS = {
    "sport": listed(
        "ball coach cup football game goal match player race runner score stadium team tennis "
        "trophy winner"
    ),
    "food": listed(
        "bread butter cake cheese cook dinner kitchen lunch meal oven plate recipe salad sauce "
        "soup supper"
    ),
    "weather": listed(
        "cloud cold fog frost hail heat ice rain snow storm sun sunshine temperature thunder "
        "wind winter"
    ),
    "music": listed(
        "band choir concert drum flute guitar melody note orchestra piano rhythm singer song "
        "tune violin voice"
    ),
    "travel": listed(
        "airport boat bus flight harbour hotel journey luggage map passport plane station "
        "suitcase ticket tourist train"
    ),
}

EVERYDAY = tuple(
    dict.fromkeys(
        word
        for group in (FOODS, ANIMALS, COLOURS, OBJECTS, NOUNS, ADJECTIVES, ROOMS, INSTRUMENTS)
        for word in group
    )
)
