"""The words that the quickstart's reviews are made of."""

from typing import NamedTuple


class Lexicon(NamedTuple):
    """Words of one sentiment, by the place that they take in a sentence."""

    adjectives: list[str]
    """Of the thing itself or of a part: "the handle is ..."."""
    phrases: list[str]
    """Of the thing itself: "the kettle ..."."""
    feelings: list[str]
    """Of the reviewer: "I ... the kettle"."""


class Domain(NamedTuple):
    """What the reviews of one domain talk about."""

    items: list[str]
    """The things reviewed."""
    parts: list[str]
    """The parts and aspects that every thing has."""
    remarks: list[str]
    """Sentences that say nothing for or against the thing, with gaps such as `{day}`."""


def _words(text: str) -> list[str]:
    return text.split()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


POSITIVE = Lexicon(
    adjectives=_words("""
        good great excellent wonderful superb fantastic brilliant lovely delightful
        outstanding impressive terrific marvellous splendid remarkable charming flawless
        perfect pleasing clever first-rate beautiful exceptional magnificent fabulous
        elegant satisfying admirable stunning enjoyable amazing awesome sublime
        refreshing polished faultless gorgeous inspired dazzling glorious
    """),
    phrases=_lines("""
        won me over
        exceeded my expectations
        made my day
        impressed the whole family
        surprised me in the best way
        was worth every penny
        was a pleasure from start to finish
        earned all the praise it gets
        got everything right
        hit the mark
        was a real treat
        put a smile on my face
    """),
    feelings=_lines("""
        loved
        adored
        liked
        enjoyed
        admired
        appreciated
        was happy with
        was fond of
    """),
)

NEGATIVE = Lexicon(
    adjectives=_words("""
        bad terrible awful poor dreadful horrible disappointing mediocre clumsy annoying
        dismal lousy shoddy atrocious weak unbearable frustrating pathetic useless ugly
        irritating appalling abysmal hopeless laughable flawed unpleasant tiresome
        ridiculous sloppy inferior second-rate careless disastrous miserable wretched
        horrendous tedious awkward underwhelming
    """),
    phrases=_lines("""
        let me down
        fell short of what I hoped for
        ruined my day
        annoyed the whole family
        surprised me in the worst way
        was a waste of money
        was a chore from start to finish
        deserved all the complaints it gets
        got everything wrong
        missed the mark
        was a real mess
        tested my patience
    """),
    feelings=_lines("""
        hated
        disliked
        loathed
        detested
        could not stand
        could have done without
        was unhappy with
        was fed up with
    """),
)

FILMS = Domain(
    items=_words("""
        film thriller comedy drama romance sequel western musical mystery adventure
    """),
    parts=_lines("""
        acting
        plot
        script
        soundtrack
        ending
        camera work
        dialogue
        pacing
        opening scene
        casting
        costume design
        editing
        final act
        narration
        love story
        main character
    """),
    remarks=_lines("""
        I saw it on {day} with {person}.
        We watched it at home on {day}.
        It runs for about {number} hours.
        It is based on a novel that I read {number} years ago.
        The story is set in a harbour town.
        The cinema was half full.
        It was shown with subtitles.
        {person} chose it from the programme.
        It is the second film by the same director.
        Most of it takes place on a train.
        It came out in {month}.
        I had not read anything about it before.
        The screening started at {number} in the afternoon.
        I watched it in {month}, on a flight to Lisbon.
    """),
)

APPLIANCES = Domain(
    items=_lines("""
        kettle
        toaster
        blender
        coffee machine
        rice cooker
        mixer
        waffle iron
        juicer
        food processor
        slow cooker
    """),
    parts=_lines("""
        colour
        handle
        power cord
        display
        timer
        manual
        control panel
        base
        packaging
        design
        cleaning brush
        switch
        recipe book
        finish
        build quality
        warranty service
    """),
    remarks=_lines("""
        I ordered it in {month}.
        It arrived on {day} in a plain box.
        We use it about {number} times a week.
        It stands on the counter next to the sink.
        {person} has the same model in red.
        It replaces one that we had for {number} years.
        The box also holds a spare fuse.
        I bought it for our holiday flat.
        It weighs about {number} pounds.
        We are a household of {number}.
        I plugged it in the same evening.
        It is made of steel and plastic.
        {person} gave it to me in {month}.
        I have had it since {month}.
    """),
)

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January March April June August September October December")
NUMBERS = _words("two three four five")
PERSONS = _lines("""
    my brother
    my sister
    my neighbour
    a colleague
    an old friend
    my mother
    my uncle
""")
