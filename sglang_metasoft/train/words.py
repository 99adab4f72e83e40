"""Words that the built-in generators combine; none of them is taken from a benchmark."""

ADJECTIVES = (
    "amber ancient azure brisk calm cobalt copper crimson crystal distant dusty eager early faded famous fierce "
    "frozen gentle gilded golden grand hidden hollow humble iron ivory jolly keen late lively lone loud lucky "
    "mellow misty modest narrow noble northern odd olive pale patient plain polished proud quick quiet rapid rare "
    "rusty sacred scarlet secret sharp shy silent silver slender slow solid spare steady steep stormy strange sturdy "
    "sunny tidy timid velvet violet vivid wandering warm weary western wild windy wise wooden young zealous"
).split()
NOUNS = (
    "anchor apple arrow badger bakery banner barrel basket beacon bell blanket boulder bridge bucket canyon carpet "
    "castle cedar chapel cherry cliff clock comet compass coral cottage crane creek crown desert dolphin dragon drum "
    "eagle ember engine falcon feather ferry field flute forest fountain fox garden gate glacier goose guitar hammer "
    "harbor hawk heron hill island jacket jungle kettle kite ladder lagoon lantern lemon library lion lizard magnet "
    "maple marble market meadow mirror monkey mountain museum needle oak ocean orchard otter owl palace panther "
    "parrot pearl pepper piano pillow pine planet plum pond rabbit raven ribbon river robin rocket saddle sailor "
    "salmon shadow shell signal spider spring squirrel stone stream summit swan table temple thunder tiger tower "
    "train tulip tunnel turtle valley village violin wagon walnut whale willow window winter wolf"
).split()
NAMES = (
    "Ada Agnes Albert Alma Amir Anita Anton Astrid Bella Boris Bruno Carmen Cecil Clara Dalia Darius Diego Dora Edgar "
    "Edith Elena Emil Esther Fatima Felix Flora Gideon Greta Hana Hector Helga Hugo Ines Irma Isaac Ivan Jasper Joan "
    "Karim Klara Lars Leila Leo Lola Magnus Marta Milan Mina Nadia Niels Nora Olga Omar Oscar Paula Petra Quentin "
    "Rania Rosa Ruben Sana Sasha Selma Simon Stella Tamar Theo Ulla Vera Viktor Wanda Xenia Yusuf Zara"
).split()
PLACES = (
    "Aldermoor Brackwater Calderon Dunmere Eastvale Fernhollow Glenross Harrowgate Inverdale Juniper Kestrel Larkspur "
    "Marlow Northwick Oakhaven Pellworth Quarry Ravensby Stonebridge Thornbury Underhill Vexford Westmarch Yarrow"
).split()
JOBS = (
    "baker carpenter teacher surgeon pilot gardener lawyer painter sailor tailor farmer chemist dancer poet butcher "
    "plumber nurse miner jeweller librarian judge singer welder printer"
).split()
FILLERS = (
    "The road bends to the left and then to the right. Clouds pass over the hills all day long. ",
    "Nothing much happened that afternoon. People came and went. The kettle boiled and was set aside. ",
    "Rain falls on the roof. Leaves move in the wind. The river keeps its course. And so it goes on. ",
    "One day follows another. The birds return each spring. A door opens somewhere and closes again. ",
    "Trams run along the quay until midnight. After that one walks, or waits for the milk cart. ",
)
