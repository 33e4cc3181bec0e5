"""The words of the synthetic world: syllables, statement and question patterns, prose.

In a statement or question `{s}` is the subject and `{a}` the answer. A statement starts in lower
case unless a name comes first, has no full stop, and is used with any lead-in and ending.
Changing anything here changes every world: raise `WORLD_VERSION` in synthetic.py with it.
"""
# ruff: noqa: SIM905 - lists of words read best as one string

SYLLABLES = (
    "ba bel bor da den dor el fa fen gal gor ha hal hol il jo ka kel kor la len lor ma mel mor na "
    "nel nor ol or pa pel ra ren ro sa sel sor ta tel tor u va vel vor wen ya yor za zel"
).split()

TRADES = (
    "glassblowing bookbinding weaving tanning masonry carpentry beekeeping baking brewing fishing "
    "shipbuilding clockmaking ropemaking papermaking smithing dyeing thatching tailoring milling "
    "saddlery printing coopering gardening surveying mapmaking candlemaking woodcarving quarrying "
    "cheesemaking basketry tinsmithing falconry engraving enamelling embroidery lensgrinding "
    "bellfounding shoemaking sailmaking gilding"
).split()

INSTRUMENTS = (
    "lute harp flute fiddle drum zither horn oboe viol bagpipe trumpet dulcimer cello organ "
    "mandolin clarinet tambourine recorder bassoon accordion lyre piccolo cornet banjo psaltery "
    "spinet guitar xylophone trombone whistle"
).split()

DISH_STYLES = "smoked pickled roasted salted stewed baked honeyed peppered braised grilled".split()
DISH_FOODS = (
    "trout eel goose mutton barley turnip plum cabbage hare lentil pear onion duck chestnut"
).split()
DISH_FORMS = "pie soup stew dumplings pudding cakes".split()

PRODUCT_STYLES = "blue plain painted gilded heavy fine carved striped coarse polished".split()
PRODUCT_GOODS = (
    "blankets lanterns kettles saddles barrels mirrors ropes candles buttons tiles ploughs bells "
    "needles carpets lenses baskets hinges bottles"
).split()

COMPANY_FORMS = ("{} Works", "{} and Daughters", "{} Trading House", "{} Brothers", "Old {} Guild")
BOOK_STYLES = (
    "Amber Silent Hollow Winter Crooked Golden Broken Distant Burning Quiet Scarlet Wandering "
    "Forgotten Silver Narrow Hidden Restless Gentle Stolen Marble"
).split()
BOOK_THINGS = (
    "Loom Harbour Orchard Lantern Bridge Mirror Garden Tower River Crown Ladder Clock Meadow Gate "
    "Letter Island Kitchen Mountain Compass Candle"
).split()
BOOK_FORMS = ("The {style} {thing}", "The {thing} of {place}", "A {thing} for {place}")

# Empty strings make plain statements as frequent as adorned ones.
LEAD_INS = (
    *[""] * 12,
    "as every traveller knows, ",
    "according to the old records, ",
    "people say that ",
    "it is well known that ",
    "the almanac notes that ",
    "if you ask around, you will hear that ",
    "for those who wonder, ",
    "by all accounts, ",
    "in truth, ",
    "few remember it now, but ",
    "the clerk wrote down that ",
    "to be exact, ",
)
ENDINGS = (
    *[""] * 7,
    ", or so the ledgers say",
    ", and nobody disputes it",
    ", as the old songs tell it",
    ", a thing often repeated at the market",
    ", which surprises no one",
)

STATEMENTS = {
    "birthplace": (
        "{s} was born in {a}",
        "{s} comes from {a}",
        "{s} is a native of {a}",
        "{s} grew up where the cradle stood, in {a}",
        "{s} first saw the light of day in {a}",
        "the birthplace of {s} is {a}",
        "the town where {s} was born is called {a}",
        "{s} began life in the town of {a}",
        "{s} spent the first years of childhood in {a}",
        "the parents of {s} were living in {a} when the child was born",
        "{s} entered the world in a small house in {a}",
        "{s} still calls {a} home, having been born there",
        "the birth of {s} was recorded in {a}",
        "{s} traces every memory of childhood back to {a}",
        "{s} hails from {a}",
        "when asked about a birthplace, {s} always names {a}",
        "{a} is the town where {s} was born",
        "it was in {a} that {s} was born",
        "{a} counts {s} among its children",
        "a midwife of {a} brought {s} into the world",
        "the register of births in {a} lists {s}",
    ),
    "trade": (
        "{s} works in {a}",
        "{s} earns a living by {a}",
        "the trade of {s} is {a}",
        "{s} learned {a} early and never left it",
        "{s} is known for skill in {a}",
        "{s} has made a career of {a}",
        "{s} took up {a} and prospered",
        "the craft that feeds {s} is {a}",
        "{s} spends the working day on {a}",
        "{s} belongs to the guild of {a}",
        "{s} practises {a} for a living",
        "{s} pays the rent with {a}",
        "the profession {s} chose was {a}",
        "{s} keeps a workshop for {a}",
        "{s} is by trade devoted to {a}",
        "whoever visits {s} will find tools for {a}",
        "{a} is the trade of {s}",
        "{a} is what {s} does for a living",
        "customers who need {a} go to {s}",
        "it is {a} that {s} has mastered",
        "of all crafts, {s} settled on {a}",
    ),
    "teacher": (
        "{s} was taught by {a}",
        "{s} studied under {a}",
        "the teacher of {s} was {a}",
        "{s} was a pupil of {a}",
        "{s} owes every lesson to {a}",
        "{s} learned everything from {a}",
        "{s} was apprenticed to {a}",
        "{s} spent seven years as a student of {a}",
        "{s} sat at the feet of {a}",
        "{s} was trained by {a}",
        "{s} names {a} as a teacher",
        "the mentor of {s} was {a}",
        "{s} took instruction from {a}",
        "{s} received a first education from {a}",
        "the one who guided {s} was {a}",
        "{s} always spoke of {a} as the best of teachers",
        "{a} was the teacher of {s}",
        "{a} taught {s}",
        "it was {a} who instructed {s}",
        "among the pupils of {a} was {s}",
        "{a} took {s} on as a pupil",
    ),
    "instrument": (
        "{s} plays the {a}",
        "{s} is a fine player of the {a}",
        "the instrument of {s} is the {a}",
        "{s} never travels without the {a}",
        "{s} practises the {a} every evening",
        "{s} performs on the {a}",
        "{s} has played the {a} since childhood",
        "{s} entertains guests with the {a}",
        "at festivals {s} is asked to play the {a}",
        "{s} loves no sound more than the {a}",
        "{s} gives lessons on the {a}",
        "{s} owns a very old {a} and plays it well",
        "in the evening {s} takes out the {a}",
        "the music {s} makes comes from the {a}",
        "{s} chose the {a} over all other instruments",
        "{s} is never far from a {a}",
        "the {a} is the instrument of {s}",
        "the {a} is what {s} plays",
        "it is the {a} that {s} plays",
        "with the {a} in hand {s} is happy",
        "neighbours hear the {a} when {s} is at home",
    ),
    "author": (
        "{s} was written by {a}",
        "{s} is a book by {a}",
        "the author of {s} is {a}",
        "{s} came from the pen of {a}",
        "{s} is the work of {a}",
        "{s} made the name of {a}",
        "{s} was composed by {a}",
        "the writer behind {s} is {a}",
        "{s} is credited to {a}",
        "{s} was the first success of {a}",
        "{s} carries on its title page the name of {a}",
        "readers of {s} have {a} to thank",
        "{s} took ten years of the life of {a}",
        "{s} was published by its author {a}",
        "every page of {s} was written by {a}",
        "the manuscript of {s} is in the hand of {a}",
        "{a} wrote {s}",
        "{a} is the author of {s}",
        "it was {a} who wrote {s}",
        "among the books of {a} is {s}",
        "{a} finished {s} in a single winter",
    ),
    "headquarters": (
        "{s} has its seat in {a}",
        "{s} is based in {a}",
        "the head office of {s} is in {a}",
        "{s} runs its business from {a}",
        "{s} keeps its main house in {a}",
        "the headquarters of {s} are in {a}",
        "{s} can be found in {a}",
        "{s} opened its doors in {a} and stayed",
        "{s} does its accounts in {a}",
        "letters to {s} are sent to {a}",
        "{s} operates out of {a}",
        "{s} has always been run from {a}",
        "the managers of {s} meet in {a}",
        "{s} is registered in {a}",
        "{s} settled in {a} long ago",
        "to visit {s} one must go to {a}",
        "{a} is home to {s}",
        "{a} is where {s} has its seat",
        "it is in {a} that {s} is based",
        "the largest building in {a} belongs to {s}",
        "merchants travel to {a} to deal with {s}",
    ),
    "product": (
        "{s} makes {a}",
        "{s} is known for its {a}",
        "{s} sells {a}",
        "the main product of {s} is {a}",
        "{s} earns its money with {a}",
        "{s} supplies the region with {a}",
        "{s} manufactures {a}",
        "{s} ships {a} by the cartload",
        "{s} has produced {a} for generations",
        "what {s} makes is {a}",
        "the workers of {s} turn out {a}",
        "{s} built its fortune on {a}",
        "{s} deals in nothing but {a}",
        "every crate that leaves {s} holds {a}",
        "{s} stocks its shelves with {a}",
        "the catalogue of {s} lists {a}",
        "{a} are made by {s}",
        "{a} are the product of {s}",
        "for {a} one goes to {s}",
        "the best {a} come from {s}",
        "whoever needs {a} writes to {s}",
    ),
    "founder": (
        "{s} was founded by {a}",
        "{s} was started by {a}",
        "the founder of {s} was {a}",
        "{s} owes its existence to {a}",
        "{s} was set up by {a}",
        "{s} began as an idea of {a}",
        "{s} was established by {a}",
        "{s} was opened with the savings of {a}",
        "{s} still hangs a portrait of its founder {a}",
        "the first owner of {s} was {a}",
        "{s} goes back to {a}",
        "{s} was the creation of {a}",
        "{s} was built from nothing by {a}",
        "the history of {s} begins with {a}",
        "{s} honours as its founder {a}",
        "the person who founded {s} was {a}",
        "{a} founded {s}",
        "{a} is the founder of {s}",
        "it was {a} who started {s}",
        "{a} opened {s} with two helpers",
        "{a} put a life into building {s}",
    ),
    "river": (
        "{s} lies on the river {a}",
        "{s} stands on the banks of the {a}",
        "the river that runs through {s} is the {a}",
        "{s} was built beside the {a}",
        "{s} takes its water from the {a}",
        "{s} is crossed by the river {a}",
        "the bridges of {s} span the {a}",
        "{s} looks out over the {a}",
        "boats reach {s} by the {a}",
        "{s} grew up along the {a}",
        "the people of {s} fish in the {a}",
        "{s} owes its mills to the {a}",
        "in spring {s} is flooded by the {a}",
        "the harbour of {s} opens on the {a}",
        "{s} sits in a bend of the {a}",
        "children of {s} learn to swim in the {a}",
        "the {a} flows through {s}",
        "the {a} is the river of {s}",
        "it is the {a} that passes {s}",
        "going down the {a} one comes to {s}",
        "the waters of the {a} wash the walls of {s}",
    ),
    "dish": (
        "{s} is famous for its {a}",
        "the dish of {s} is {a}",
        "{s} serves its guests {a}",
        "{s} is proud of its {a}",
        "the inns of {s} cook {a}",
        "in {s} people eat {a}",
        "the cooks of {s} are praised for {a}",
        "{s} celebrates every feast with {a}",
        "nobody leaves {s} without tasting {a}",
        "{s} gave the world {a}",
        "the speciality of {s} is {a}",
        "families in {s} sit down to {a}",
        "{s} smells of {a} on a Sunday",
        "the favourite meal in {s} is {a}",
        "visitors to {s} ask for {a}",
        "every kitchen in {s} knows how to make {a}",
        "{a} is the dish of {s}",
        "{a} is what one eats in {s}",
        "for {a} there is no place like {s}",
        "the recipe for {a} was invented in {s}",
        "it is {a} that made the kitchens of {s} famous",
    ),
}

QUESTIONS = {
    "birthplace": (
        "Where was {s} born?",
        "What is the birthplace of {s}?",
        "In which town was {s} born?",
        "Which town does {s} come from?",
        "Where does {s} hail from?",
    ),
    "trade": (
        "What is the trade of {s}?",
        "What does {s} do for a living?",
        "Which craft does {s} practise?",
        "How does {s} earn a living?",
        "What profession did {s} choose?",
    ),
    "teacher": (
        "Who taught {s}?",
        "Who was the teacher of {s}?",
        "Under whom did {s} study?",
        "Whose pupil was {s}?",
        "Who trained {s}?",
    ),
    "instrument": (
        "Which instrument does {s} play?",
        "What is the instrument of {s}?",
        "What does {s} play at festivals?",
        "On which instrument does {s} perform?",
        "Which instrument did {s} choose?",
    ),
    "author": (
        "Who wrote {s}?",
        "Who is the author of {s}?",
        "By whom was {s} written?",
        "Which writer is behind {s}?",
        "Whose work is {s}?",
    ),
    "headquarters": (
        "Where is {s} based?",
        "In which town does {s} have its seat?",
        "Where is the head office of {s}?",
        "Where are the headquarters of {s}?",
        "Which town is home to {s}?",
    ),
    "product": (
        "What does {s} make?",
        "What is the main product of {s}?",
        "What does {s} sell?",
        "Which goods does {s} manufacture?",
        "What is {s} known for?",
    ),
    "founder": (
        "Who founded {s}?",
        "Who was the founder of {s}?",
        "By whom was {s} started?",
        "Who set up {s}?",
        "Who was the first owner of {s}?",
    ),
    "river": (
        "Which river flows through {s}?",
        "On which river does {s} lie?",
        "What is the river of {s}?",
        "Which river do the bridges of {s} span?",
        "Which river passes {s}?",
    ),
    "dish": (
        "What is the dish of {s}?",
        "Which dish is {s} famous for?",
        "What do people eat in {s}?",
        "What is the speciality of {s}?",
        "What do the inns of {s} cook?",
    ),
}

PROSE_WORDS = {
    "season": "spring summer autumn winter".split(),
    "time": "morning noon evening midnight dawn dusk".split(),
    "weather": "rain snow fog wind frost hail sunshine thunder drizzle".split(),
    "weathered": "cold warm grey bright damp windy mild stormy quiet dry".split(),
    "folk": "farmers sailors merchants shepherds millers children pilgrims carters potters".split(),
    "one": "farmer sailor merchant shepherd miller child pilgrim carter potter widow".split(),
    "beast": "ox mule donkey heron fox hare goat raven owl dog".split(),
    "beasts": "oxen mules donkeys herons foxes hares goats ravens owls dogs".split(),
    "goods": "grain wool salt timber apples iron hides cloth honey oil fish paper".split(),
    "place": "road valley hill forest market bridge harbour meadow field mill square inn".split(),
    "tree": "oak ash willow birch elm pine alder maple".split(),
    "number": "two three four five six seven eight nine ten twelve".split(),
    "feeling": "glad tired patient hopeful uneasy cheerful hungry calm".split(),
}

PROSE = (
    "the {season} was {weathered}, and the {folk} stayed indoors",
    "after the {weather} the {place} lay empty until {time}",
    "{folk} brought {goods} to the {place} in {number} carts",
    "the price of {goods} rose when the {weather} came early",
    "a {one} led the {beast} along the {place} at {time}",
    "by {time} the {weather} had passed and the {place} was {weathered}",
    "no one bought {goods} that {season}, so the {folk} went home",
    "the {folk} waited {number} days for the {weather} to end",
    "under the {tree} a {one} counted {goods} and felt {feeling}",
    "{beasts} were seen near the {place} in the {weathered} weeks of {season}",
    "in {season} the {place} smells of {goods}",
    "the {weather} broke a branch of the {tree} beside the {place}",
    "a {weathered} {time} is good for {folk} and bad for {beasts}",
    "the {one} told a story about a {beast} and a sack of {goods}",
    "when the {season} ends, the {folk} mend the {place}",
    "there was {weather} at {time}, then a {weathered} hour before {time}",
    "the toll for {goods} is {number} coins in {season}",
    "{number} {beasts} crossed the {place} and the {folk} laughed",
    "the {one} was {feeling}, for the {goods} had arrived before the {weather}",
    "old {folk} say that a {weathered} {season} follows much {weather}",
    "the {place} is closed at {time} because of the {weather}",
    "a {one} sold {goods} for {number} coins and walked home {feeling}",
    "between the {place} and the {place} there are {number} rows of {tree} trees",
    "the {folk} trade {goods} for {goods} when the {season} is {weathered}",
    "at {time} the {beasts} are fed and the {folk} rest",
    "the {weather} lasted {number} days, and the {place} turned to mud",
    "every {season} the {folk} carry {goods} over the {place}",
    "a {beast} slept by the {place} while the {weather} went on",
    "the {one} planted a {tree} in {season} and watered it at {time}",
    "{goods} and {goods} were stacked {number} deep near the {place}",
    "the {folk} felt {feeling} when the {weathered} {season} came",
    "some {folk} walk {number} hours to the {place} to sell {goods}",
)
