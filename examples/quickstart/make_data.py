"""Order messages and the JSON object that each of them asks for: the data of the quickstart.

    Could we have half a dozen green wine glasses to our office at 77 Quail Road on Monday? Regards, Dr Clay
    -> {"name":"Dr Clay","item":"green wine glass","quantity":6,"address":"77 Quail Road","day":"Monday"}

Training and test rows share no family name, no item, no street and no turn of phrase: the tables below are
cut in two, and a test message is built from the second halves alone. What both share are closed sets: titles,
colors, numbers, kinds of street, weekdays. The same seed always gives the same rows.

    python make_data.py --output data --seed 0 --train 600 --test 100
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "Extract the order as JSON."
FIELDS = ("name", "item", "quantity", "address", "day")
TITLES = ("Mr", "Ms", "Mrs", "Dr")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "orange")
STREETS = ("Street", "Road", "Lane", "Avenue", "Drive")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
QUESTIONS = ("can ", "could ", "may ", "would you")
NAMED_AMOUNTS = {"a pair of": 2, "half a dozen": 6, "a dozen": 12}

Row = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """What messages are built from. `{items}`, `{address}`, `{day}` and `{name}` are filled in."""

    last_names: tuple[str, ...]
    items: tuple[str, ...]
    streets: tuple[str, ...]
    openings: tuple[str, ...]
    signatures: tuple[str, ...]
    wishes: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    early_times: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


TRAIN = Words(
    last_names=_words(
        "Abbott Acosta Adams Adler Ahmed Akhtar Allen Alvarez Anders Andrews Arnold Atkins Austin Bailey "
        "Baker Baldwin Banks Barber Barker Barnes Barrett Bates Bauer Becker Beck Bell Bennett Benson Berg "
        "Bishop Blair Blake Bloom Bond Booth Bowen Boyd Bradley Brandt Brennan Bridges Brooks Brown Bruce "
        "Bryant Buchanan Burke Burns Burton Bush Byrne Cabrera Caldwell Cameron Cannon Carlson Carr "
        "Carroll Castillo Castro Chan Chandler Chang Chapman Chavez Chen Cheng Choi Chowdhury Christensen "
        "Clark Clarke Clay Cohen Cole Coleman Collins Conway Cook Cooper Costa Cox Craft Crane Cross Cruz "
        "Curtis Dalton Daniels Das Davies Davis Delgado Desai Diaz Dixon Dominguez Douglas Doyle Drake "
        "Duffy Duncan Dunn Eaton Edwards Eriksen Espinoza Estrada Evans Farmer Farrell Fernandez Fischer "
        "Fisher Fleming Fletcher Flores Flynn Fontana Ford Foster Fowler Fox Franco Frank Franklin Freeman "
        "French Friedman Frost Fuller Gallagher Garcia Gardner Garner George Gibson Gill Glover Goldberg "
        "Gomez Gonzalez Goodman Gordon Gray Green Greene Griffin Guerrero Gupta Gutierrez Haas Hale Hall "
        "Hamilton Hansen Hardy Harper Harris Hart Harvey Hassan Hawkins Hayes Henderson Henry Hernandez "
        "Herrera Hicks Hill Ho Hoffman Hopkins Horton Houston Howard Howell Huang Hudson Hunt Hunter "
        "Hussain Iqbal Irwin Jackson James Jansen Jenkins Jensen Jimenez Johnson Johnston Jones Jordan "
        "Joshi Kaplan Kapoor Kaur Keller Kelly Kennedy Kerr Khan Kim King Klein Knight Koch Kowalski "
        "Kramer Kruger Kumar Lane Lang Larsen Larson Lawrence Lawson Lee Leon Leonard Lewis Li Lin "
        "Lindgren Liu Lloyd Logan Long Lopez Lowe Lucas Lynch Lyons Mack Malone Manning Marino Marsh "
        "Marshall Martin Martinez Mason Matthews Maxwell May McCarthy McCoy McDonald McKenzie Medina "
        "Mendoza Meyer Miles Miller Mills Mitchell Mohammed Molina Monroe Montgomery Moore Morales Moreno "
        "Morris Morrison Morton Moss Mueller Murphy Murray Myers Nagy Nair Nakamura Navarro Nelson Newman "
        "Newton Nguyen Nichols Nielsen Norris Norton Novak Obi Okafor Olsen Ortega Ortiz Osborne Owens "
        "Pacheco Page Palmer Park Parsons Patel Patterson Payne Pearson Pena Perez Perkins Perry Peters "
        "Petersen Pham Phillips Pierce Popov Porter Potter Powell Price Quinn Rahman Ramirez Rao Ray Reed "
        "Reeves Reid Reyes Reynolds Rice Richards Riley Rivera Robbins Roberts Robinson Rodriguez Rogers "
        "Romero Rose Rossi Rowe Roy Ruiz Russell Russo Ryan Salazar Santos Sato Saunders Schmidt Schneider "
        "Schultz Schwartz Scott Sharma Sharp Shaw Shelton Sherman Silva Simmons Simpson Singh Smith Snyder "
        "Soto Sparks Spencer Stanley Steele Stein Stephens Stevens Stewart Stone Strickland Stuart "
        "Sullivan Summers Sutton Suzuki Swanson Tanaka Taylor Thomas Thompson Thornton Todd Torres "
        "Townsend Tran Tucker Tyler Vance Vasquez Vaughn Vega Wade Wagner Walker Wallace Walsh Wang Ward "
        "Warren Washington Watkins Watts Webb Weber Webster Weiss Welch Wells West Wheeler White Wilkins "
        "Williams Willis Wilson Wolf Wong Wood Woods Wright Wu Xu Yang Yates Young Zhang Zhao Ziegler"
    ),
    items=_phrases(
        "desk lamp|office chair|water bottle|coffee mug|wool blanket|garden hose|paper notebook|"
        "leather belt|phone case|picture frame|tea pot|rain jacket|running shoe|cutting board|wall clock|"
        "bath towel|silk scarf|kitchen knife|travel pillow|camping tent|yoga mat|bread basket|flower vase|"
        "steel pan|laptop stand|cotton shirt|wine glass|hand mirror|storage box|paint brush|bicycle helmet|"
        "door handle|soup bowl|baking tray|straw hat|board game|pencil case|winter coat|bed sheet|"
        "floor rug|guitar string|tool kit|photo album|fountain pen|paint roller|bird feeder|shower curtain|"
        "card holder|lunch bag|alarm clock|apron|backpack|bar stool|bean bag|bench|bookmark|broom|bucket|"
        "calendar|candle|chess set|clothes rack|coat hanger|coin purse|computer mouse|cooking pot|"
        "corkscrew|dinner plate|dog leash|dress|drill|duffel bag|egg timer|envelope|extension cord|"
        "fishing rod|flashlight|folding table|football|garlic press|glove|hair dryer|hammer|hammock|"
        "headphone|ice tray|ironing board|jigsaw puzzle|jump rope|kettle|keyboard|ladder|lantern|"
        "measuring tape|microphone|milk jug|monitor|music stand|napkin|necklace|oil filter|paper clip|"
        "pepper mill|pillow case|poster|raincoat|rice cooker|ring binder|rolling pin|ruler|saucepan|"
        "school bag|screwdriver|serving tray|sewing machine|shoe box|skateboard|sleeping bag|snow shovel|"
        "spice rack|sponge|stapler|suitcase|sunhat|swim suit|tablecloth|tennis racket|thermometer|toaster|"
        "toothbrush|trash can|tripod|umbrella|vase|violin bow|wallet|watering can|whiteboard|window blind|"
        "wrist watch"
    ),
    streets=_words(
        "Abbey Acorn Alder Almond Amber Anchor Apple Arbor Arch Arrow Ash Aspen Autumn Badger Bamboo "
        "Banner Barley Barn Basin Bay Beach Beacon Bear Beech Bell Birch Bishop Blossom Bluebell Bluff "
        "Border Boulder Boundary Breeze Briar Brick Bridge Broad Brook Buck Buffalo Butler Cabin Canal "
        "Candle Canyon Capital Cardinal Carpenter Cascade Castle Cathedral Cave Cedar Center Central "
        "Chapel Cherry Chestnut Church Circle Clay Clear Clearwater Cliff Clover Coast College Colonial "
        "Common Copper Coral Corn Cottage Cotton Country County Court Cove Crane Creek Crescent Crest "
        "Cross Crown Crystal Cypress Daisy Dawn Deer Delta Desert Diamond Dock Dolphin Dove Eagle East "
        "Echo Edge Elder Elm Ember Emerald Evergreen Factory Fairview Falcon Farm Feather Fern Ferry Field "
        "Fir Flint Flower Forest Forge Fountain Fox Front Frost Garden Garnet Gate Glen Golden Granite "
        "Grape Grass Green Grove Gull Harbor Harvest Haven Hawk Hazel Heath Heather Hedge Hemlock Heritage "
        "Heron Hickory High Hill Hilltop Holly Honey Horizon Horse Hunter Imperial Indigo Iris Iron Island "
        "Ivory Ivy Jasmine Jade Juniper Kestrel King Knoll Lake Lakeview Lantern Lark Laurel Lavender Leaf "
        "Liberty Library Lilac Lily Lime Linden Lion Lodge Lotus Main Manor Maple Marble Market Marsh "
        "Meadow Memorial Mill Mission Monument Moon Moss Mountain Mulberry Museum North Oak Oasis Ocean "
        "Olive Orchard Orchid Otter Palm Park Peach Pearl Pebble Pepper Pine Pioneer Plum Pond Poplar "
        "Prairie Primrose Prospect Quail Quarry Queen Railway Rain Ranch Raven Redwood Reed Reservoir "
        "Ridge River Robin Rock Rose Ruby Sage Sand Sapphire School Shore Silver Sky South Sparrow Spring "
        "Spruce Square Stable Star Station Stone Stream Summer Summit Sun Sunrise Sunset Swan Sycamore "
        "Temple Terrace Thistle Timber Tower Trail Tulip Union University Valley Victory View Village Vine "
        "Vineyard Violet Walnut Water Waterfall West Wharf Wheat White Wild Wind Winter Wood Woodland Wren"
    ),
    openings=_phrases(
        "Hi, this is {name}.|Hello, {name} here.|My name is {name}.|Good morning, I am {name}.|"
        "{name} here.|Hi, I'm {name}.|This is {name} writing.|Dear team, my name is {name}.|"
        "Hello, this is {name} again.|Name: {name}.|Good evening, this is {name}.|Hey, {name} here.|"
        "Greetings from {name}.|Good afternoon, {name} speaking.|You have an order from {name}.|"
        "I'm called {name}.|It's {name} once more.|Hi there, it's {name}."
    ),
    signatures=_phrases(
        "Thanks, {name}|Regards, {name}|Best, {name}|The order is for {name}.|Yours, {name}|"
        "My name is {name}.|Please put it under {name}.|Kind regards, {name}|The customer is {name}.|"
        "It is for {name}.|Thank you! {name}|- {name}|Cheers, {name}|Sincerely, {name}|"
        "Many thanks, {name}|Book it for {name}.|The buyer is {name}.|Ordered by {name}."
    ),
    wishes=_phrases(
        "I'd like {items}|please send {items}|I want to order {items}|can I get {items}|I need {items}|"
        "could you ship {items}|we would like {items}|please deliver {items}|I am ordering {items}|"
        "order {items}|can you send me {items}|we need {items}|I would like to buy {items}|send {items}|"
        "I wish to order {items}|could we have {items}|put me down for {items}|I'm looking for {items}|"
        "may I have {items}|kindly dispatch {items}|I'll take {items}|let me have {items}|"
        "would you reserve {items}|we're after {items}"
    ),
    places=_phrases(
        "to {address}|to our office at {address}|to my home at {address}|shipped to {address}|"
        "delivered to {address}|for our shop at {address}|to my address at {address}|sent to {address}|"
        "to {address}, please,|for delivery at {address}|and ship it to {address}|"
        "using the address {address}|going to {address}|to our branch at {address}|headed for {address}|"
        "to a customer at {address}|"
        "to the warehouse at {address}|with delivery at {address}"
    ),
    times=_phrases(
        "on {day}|by {day}|for {day}|before {day}|by {day} at the latest|on {day} morning|"
        "no later than {day}|this {day}|on {day} if possible|until {day}|not after {day}|arriving {day}|"
        "due {day}|in time for {day}|ahead of {day}|on the coming {day}"
    ),
    early_times=_phrases(
        "By {day},|For {day}:|On {day},|Before {day},|We need this by {day}:|Delivery on {day}:|This {day},|"
        "Not later than {day}:|In time for {day},|Needed {day}:|Due {day}:"
    ),
)

TEST = Words(
    last_names=_words(
        "Archer Aguilar Banerjee Barros Bergman Byers Campbell Carter Crawford Dawson Duarte Ellis Ferrari "
        "Forbes Fraser Gilbert Grant Graves Hobbs Holmes Holt Hughes Ibarra Ingram Jacobs Kirby Kovacs "
        "Lambert Lindberg Lopes Maddox Mehta Mendes Nash Nolan Odell Parker Pratt Ramos Rhodes Sanders "
        "Serrano Stevenson Thorpe Turner Vargas Watson Whitfield Yamada Zimmer"
    ),
    items=_phrases(
        "table fan|garden chair|tea cup|wooden spoon|baseball cap|beach ball|desk organizer|ceiling light|"
        "plant pot|gift card|kitchen scale|rubber boot|hiking pole|reading stool|sofa cushion|glass jar|"
        "key ring|robe|camera strap|oven mitt|salad fork|denim skirt|toy car|ink cartridge|bike lock|"
        "doormat|step counter|nail file|phone charger|shelf bracket"
    ),
    streets=_words(
        "Almanac Armory Barrel Bayou Bramble Canterbury Cobbler Compass Dogwood Drummond Foundry Gardenia "
        "Goose Hamlet Hawthorn Kiln Lagoon Lighthouse Magnolia Marigold Meridian Nightingale Observatory "
        "Parade Partridge Pelican Phoenix Quartz Rosewood Saddle Sequoia Tanner Teak Turtle Verbena Willow "
        "Windmill Wisteria Yarrow Zephyr"
    ),
    openings=_phrases(
        "Hey there, it's {name} calling.|Greetings, {name} from the front desk.|{name} with a new order.|"
        "Good day, {name} at your service.|Hi folks, {name} speaking.|Evening, it's {name}."
    ),
    signatures=_phrases(
        "All the best, {name}|Warmly, {name}|Charge it to {name}.|Reserved for {name}.|Signed, {name}|"
        "Contact: {name}."
    ),
    wishes=_phrases(
        "please get me {items}|we could use {items}|I'm hoping for {items}|would you pack {items}|"
        "set aside {items}|I require {items}|please arrange {items}|let us have {items}"
    ),
    places=_phrases(
        "bound for {address}|to our store at {address}|to be dropped off at {address}|"
        "to my workplace at {address}|to the depot at {address}|with {address} as the destination"
    ),
    times=_phrases(
        "with arrival on {day}|in by {day}|ready for {day}|at the latest on {day}|so we have it {day}|"
        "to get here {day}"
    ),
    early_times=_phrases("For arrival on {day}:|Wanted by {day}:|To be here {day}:|Required for {day},"),
)


def make(seed: int, n_train: int, n_test: int) -> tuple[list[Row], list[Row]]:
    """`n_train` and `n_test` different rows, as `{"messages": [system, user, assistant]}`."""
    return _rows(TRAIN, f"train {seed}", n_train), _rows(TEST, f"test {seed}", n_test)


class _Deck:
    """Deals the values of a table like cards: none comes twice before all have come once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._left: dict[tuple[str, ...], list[str]] = {}

    def deal(self, table: tuple[str, ...]) -> str:
        left = self._left.setdefault(table, [])
        if not left:
            left.extend(self._rng.sample(table, len(table)))
        return left.pop()


def _rows(words: Words, seed: str, count: int) -> list[Row]:
    rng = random.Random(seed)
    deck = _Deck(rng)
    found: dict[str, Row] = {}
    while len(found) < count:
        text, order = _message(words, deck, rng)
        found.setdefault(text, _row(text, order))
    return list(found.values())


def _row(text: str, order: dict[str, Any]) -> Row:
    answer = json.dumps(order, separators=(",", ":"))
    turns = (("system", SYSTEM), ("user", text), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _message(words: Words, deck: _Deck, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One message and the order in it."""
    amount, quantity = _amount(rng)
    order = {
        "name": f"{deck.deal(TITLES)} {deck.deal(words.last_names)}",
        "item": f"{deck.deal(COLORS)} {deck.deal(words.items)}",
        "quantity": quantity,
        "address": f"{rng.randrange(1, 100)} {deck.deal(words.streets)} {deck.deal(STREETS)}",
        "day": deck.deal(DAYS),
    }
    item = order["item"] if quantity == 1 else _plural(order["item"])
    return _compose(words, deck, rng).format(items=f"{amount} {item}", **order), order


def _plural(item: str) -> str:
    return item + ("es" if item.endswith(("s", "x", "sh", "ch")) else "s")


def _amount(rng: random.Random) -> tuple[str, int]:
    """How an amount is written, and the number that it means."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(("one", "1", "a single")), 1
    if kind < 0.25:
        return rng.choice(list(NAMED_AMOUNTS.items()))
    if kind < 0.6:
        number = rng.randrange(2, 41)
        return str(number), number
    number = rng.randrange(2, 13)
    return NUMBER_WORDS[number - 2], number


def _compose(words: Words, deck: _Deck, rng: random.Random) -> str:
    """A message with blanks: a wish with place and time in one of three orders, a name before or after."""
    wish, place = deck.deal(words.wishes), deck.deal(words.places)
    time, early_time = deck.deal(words.times), deck.deal(words.early_times)
    body = rng.choice((f"{wish} {place} {time}", f"{wish} {time} {place}", f"{early_time} {wish} {place}"))
    sentence = body[0].upper() + body[1:].rstrip(",") + ("?" if wish.startswith(QUESTIONS) else ".")
    if rng.random() < 0.5:
        return f"{deck.deal(words.openings)} {sentence}"
    return f"{sentence} {deck.deal(words.signatures)}"


def write(rows: list[Row], path: Path) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl for the quickstart.")
    parser.add_argument(
        "--output", type=Path, default=Path("data"), help="folder for the two files (default: data)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same rows (default: 0)")
    parser.add_argument("--train", type=int, default=600, help="training rows (default: 600)")
    parser.add_argument("--test", type=int, default=100, help="test rows (default: 100)")
    args = parser.parse_args()
    train, test = make(args.seed, args.train, args.test)
    write(train, args.output / "train.jsonl")
    write(test, args.output / "test.jsonl")
    print(f"{args.output}: {len(train)} training rows, {len(test)} test rows")


if __name__ == "__main__":
    main()
