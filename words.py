"""The word lists of negatives.py, as plain data: hand-made from the commonest words of COCO and
Flickr8k. All of them are lemmas; one group of words a line."""

from functools import cache

# The words of a group may be true of one and the same thing.
SYNONYMS = [
    "cat kitten",
    "horse pony",
    "cow bull cattle ox calf",
    "bike bicycle cycle",
    "motorcycle motorbike bike scooter moped",
    "car automobile",
    "truck van pickup",
    "plane airplane jet aircraft airliner",
    "boat ship sailboat canoe kayak raft vessel",
    "street road avenue lane highway path pavement sidewalk",
    "path trail track dirt",
    "house home",
    "bathroom restroom",
    "table desk counter",
    "sofa couch chair seat bench",
    "plate dish platter tray",
    "cup mug glass",
    "picture photo photograph image portrait view shot camera",
    "marking spot",
    "grass field lawn yard park meadow pasture ground",
    "ground floor dirt sand",
    "beach sand shore coast ocean sea",
    "water ocean sea lake river pool pond stream wave waterhole",
    "arm hand",
    "shoe boot sneaker",
    "hill mountain slope cliff rock",
    "hill slope trail track ramp",
    "forest wood tree bush",
    "snow ice",
    "shirt jacket coat top sweater",
    "track racetrack",
    "hat cap helmet",
    "ball football basketball baseball soccer tennis frisbee",
    "game match",
    "big large huge giant tall long",
    "small little tiny short young",
    "old elderly older",
    "dark black",
    "light white bright",
    "closed shut",
    "swan goose duck",
    "metal metallic",
    "warm hot",
    "cool cold",
    "tan golden yellow blond blonde",
    "tan brown",
    "gray grey silver",
    "snowy white cold",
    "grassy green",
    "wooden brown",
    "rocky stony",
    "look watch stare staring gaze see",
    "stand pose wait lean",
    "sit rest relax lie lay sleep",
    "crouch kneel squat",
    "ride surf skate ski slide race glide",
    "run race chase play jump leap move",
    "walk stroll move run hike jog",
    "hold carry catch retrieve bring",
    "ride drive travel",
    "jump leap hop fly dive",
    "step walk climb",
    "ascend climb cross",
    "stick hang attach",
    "dock park sit",
    "park stop stand position display line",
    "perform attempt try do",
    "hold eat drink",
    "play compete fight wrestle splash dig hug tackle chase kick",
    "extend raise put swing",
    "dress wrap",
    "hold carry wear",
    "eat chew",
    "talk speak chat",
    "smile laugh pose",
    "fill cover",
]

PERSONS = "person people adult human someone child kid youth teenager teen toddler baby"
RIDERS = "player rider biker bicyclist cyclist motorcyclist racer jockey driver"
ATHLETES = "skier snowboarder surfer skater skateboarder rollerblader climber hiker runner swimmer"
ROLES = "wrestler worker officer performer dancer singer musician athlete friend family team crowd"
ROLES += " batter catcher umpire pitcher referee coach goalie cook chef policeman soldier cowboy"
ROLES += " farmer fisherman bride groom tourist passenger pedestrian student teacher spectator"
CLOTHES = "shirt jacket coat top sweater shorts pants dress"
ANIMALS = "animal dog puppy cat kitten horse pony cow bull calf sheep lamb goat bird duck goose"
ANIMALS += " swan seagull pigeon parrot elephant bear zebra giraffe monkey lion tiger deer fish"
EVERYBODY = f"{RIDERS} {ATHLETES} {ROLES}"

# (names, kinds): each of the names may be true of what one of the kinds is true of.
HYPERNYMS = [
    (f"man guy male gentleman fellow boy {PERSONS}", EVERYBODY),
    (f"woman lady girl female {PERSONS}", f"{EVERYBODY} schoolgirl blond blonde brunette"),
    ("animal creature pet", ANIMALS),
    ("bird", "duck goose swan seagull gull pigeon parrot owl eagle hawk penguin chicken crow"),
    ("tree plant", "bush palm pine shrub"),
    ("plant", "flower tree bush grass"),
    ("sign", "stop"),
    ("dog puppy hound", "doberman greyhound terrier collie retriever poodle labrador shepherd"),
    ("vehicle", "car bus truck van train motorcycle bike bicycle scooter"),
    ("building structure", "house tower church home shop store barn"),
    ("room", "kitchen bathroom bedroom office"),
    ("food meal dish snack", "pizza sandwich burger salad cake fruit vegetable meat bread"),
    ("fruit", "apple orange banana"),
    ("clothes clothing outfit gear suit uniform", CLOTHES),
    ("toy", "ball frisbee"),
    ("colorful colourful colored bright", "red orange yellow green blue purple pink"),
]

COLORS = "red orange yellow green blue purple pink brown black white gray grey tan silver golden"
POSTURES = "stand sit lie lay sleep kneel crouch squat lean rest pose"
MOVES = "walk stroll jog run jump leap hop swim dive fly ride climb crawl slide skate ski surf"

NUMBERS = "two three four five six seven eight nine ten".split()
SYNONYMS += [f"{word} {number}" for number, word in enumerate(NUMBERS, 2)]

# Of the words of a group one at most is true of a thing; a word of another group may be true too.
CONTRAST = {
    "attribute": [
        f"{COLORS} blond blonde",
        "big large huge small tiny little tall short long",
        "young old elderly",
        "open closed",
        "empty full",
        "wet dry",
        "wooden metal metallic plastic glass concrete leather",
        "hot cold warm cool",
        "clean dirty",
        "indoor outdoor",
        "male female",
        "sunny cloudy rainy snowy foggy stormy",
        "round square rectangular oval triangular",
        "straight curved",
        "happy sad angry",
        "modern old ancient vintage",
    ],
    "action": [
        f"{POSTURES} {MOVES} dance fall swing float race hike drive",
        "hold carry throw kick hit wear eat drink push pull drop wash read cut cook",
        "open close",
        "smile cry frown yell",
    ],
    "number": [" ".join(NUMBERS + [str(number) for number in range(2, 11)])],
}
CONTRAST = {kind: [set(group.split()) for group in groups] for kind, groups in CONTRAST.items()}

# Sorts of things: a swap within one, or a fill, is likelier to be imaginable.
PEOPLE = f"man guy gentleman fellow boy woman lady girl {PERSONS} {EVERYBODY}"
PLACES = "street road avenue lane highway path trail sidewalk pavement runway intersection bridge"
PLACES += " field lawn yard park meadow pasture ground grass beach shore coast ocean sea lake river"
PLACES += " pool pond water snow sand dirt slope hill mountain sky city town desert forest court"
PLACES += " room kitchen bathroom bedroom hallway office restaurant store zoo airport station floor"
SORTS = [set(PEOPLE.split()), set(ANIMALS.split()), set(PLACES.split())]
# "one" and "a" aside, what stands before several things.
SEVERAL = set("several many few both these those numerous multiple various some all dozen".split())

# A word of these is neither masked nor moved without the other.
PHRASES = set(
    """
hot dog,french fry,stainless steel,fire hydrant,polar bear,teddy bear,stuffed animal,double decker
double deck,living room,dining room,flat screen,remote control,close up,traffic light,stop sign
parking lot,parking meter,cell phone,high chair,ice cream,ski slope,grizzly bear,brown bear
bowling ball,ping pong,christmas tree,ferris wheel,swimming pool,washing machine,running shoe
black bear,sea gull,cutting board,baseball bat,tennis racket,wine glass,palm tree,chain link
fast food,orange juice,green bean,sweet potato,red sox,white house,big ben,old fashioned
black and,and white,full length,high rise,high school,real estate,little league
""".replace("\n", ",").split(",")
)
NEGATIONS = set("no not n't without never nothing nobody none neither nor".split())

# "a group of men" is several men.
QUANTITIES = set("couple group bunch lot pair row number set variety kind type sort".split())
QUANTITIES.update("piece bit assortment".split())

# Too vague to make a caption false, or no object: neither masked, nor filled in, nor moved.
WEAK = set(
    """
front top side back bottom middle center centre end edge corner part way time day background
foreground thing item object area place scene air distance
other same different various several many few more most some such own multiple single next last good
nice great beautiful pretty lovely cute interesting real main whole entire available ready able
similar very close half something anything everything view image direction game wild
incoming dozen home event
be have do get go take make use show see seem appear contain include feature come let keep help try
""".split()
)
WEAK.update(QUANTITIES)

# What joins two nouns both ways, and what may stand beside it: "a dog sits next to the cat".
BOTH_WAYS = set("and or & , next beside near with by between alongside close together".split())
GLUE = set("to be stand sit lie pose play talk walk a an the some his her its their".split())


@cache
def may_also_be(word: str) -> frozenset[str]:
    """The other words that may be true of what `word` is true of, by SYNONYMS and HYPERNYMS."""
    found = set()
    for group in SYNONYMS:
        if word in group.split():
            found.update(group.split())
    for names, kinds in HYPERNYMS:
        if word in names.split():
            found.update(names.split(), kinds.split())
        elif word in kinds.split():
            found.update(names.split())
    return frozenset(found - {word})
