"""The small world of tiny-agent: names, values, texts, files and folders, drawn from a seed.

Names, paths and values are drawn so that those of the split "heldout" never occur in the split "train": a name
belongs to one of them by its checksum.
"""

import json
import zlib


def is_heldout(name):
    return zlib.crc32(name.lower().encode()) % 8 == 0


SYLLABLES = (
    "ba be bo da de do fa fe fi ga go ha hi jo ka ke ko la le lo lu ma me mi mo na ne no pa pe po ra re ri ro sa se "
    "so ta te ti to tu va ve vi wa we za ze zo bra cre dri fla glo kri pla pre sta tri vel nor tan mir dal fen gar hol "
    "kel lum mar nex orb pel quin ras sol tor umb ver wil xan yor zim"
).split()
ENDS = "n r s t l m x k th nd rk st ck sh ng".split() + [""] * 8
WORDS = (
    "amber anchor apple arrow atlas autumn badge bakery basil beacon birch blanket border bottle branch breeze bridge "
    "bronze bucket butter cabin cactus camera candle canyon carbon castle cedar cellar chain cherry cinder circle citrus "
    "clay cliff clover cobalt comet copper coral cotton crater creek cricket crystal dagger daisy delta desert diamond "
    "dolphin dragon drift eagle echo elm ember engine falcon feather fern fiddle field flint forest fossil fountain frost "
    "galaxy garden ginger glacier glass gold granite grape gravel grove hammer harbor harvest hazel helmet hill honey "
    "horizon island ivory jasmine jungle juniper kernel kettle lagoon lantern lemon lily linen lotus magnet maple marble "
    "meadow melon mercury meteor mint mirror mountain nectar needle nickel oak oasis ocean olive onyx opal orange orchid "
    "osprey otter oyster paper parrot peach pebble pepper pine planet plum pocket pollen pond poppy prairie prism pumpkin "
    "quartz quill rabbit rain raven reef ribbon river robin rocket rose ruby saddle saffron sage sail salmon sand sapphire "
    "shadow shell silver sky slate snow spark spice spruce squid star steel stone storm summit sun swan table tiger timber "
    "tulip tunnel turtle valley vapor velvet violet walnut water wave wheat willow wind winter wolf wood yarrow zebra"
).split()
# Words of one's own are made of these, with or without something before and behind.
STEMS = (
    "act add age aid aim air arm art ask band bank bar base beam bear bind bit block board boat body bond book boot bound box "
    "brain brand break bright bring broad brush build burn call camp care carry cast catch cause cell change charge chart "
    "check child class clean clear clock close cloud coat cold color cook cool count court cover craft crash cross crowd cut "
    "dance dark date deal deep depth draw dream dress drive drop dry dust earth edge end enter equal event exact face fact "
    "fair fall farm fast father fear feed feel fight fill find fire firm fish fit fix flag flat flight float floor flow fold "
    "food foot force form frame free fresh front fruit full gain gate gather give goal grain grand grant grass great green "
    "ground group grow guard guess guide hand hard head heal hear heart heat help high hold home hope horse house human hunt "
    "idea inch iron join joy judge jump just keep kind king knock know lake land large laugh law lay lead lean learn leave "
    "legal lend length level lift light like limit line link list live load lock long look loose lord lose love lower luck "
    "mark market mass match mean meet mend mind mix month moon moral mother motor mount mouth move music nail name nation near "
    "neat nerve night noise north note notice number object offer open order own pack page paint pair part party pass paste "
    "path pay peace phase pick piece pipe pitch place plain plan plant plate play point pool port post pound power press price "
    "prime print prize prove public pull pure push quick quiet race rail raise range rank rate reach read real record rent "
    "rest rich ride right ring rise road roll roof room root rope rough round rule run safe sail salt save scale scene school "
    "score screen sea search seat secret see seed sell send sense serve set shade shake shape share sharp sheet shift ship "
    "shop short show side sign silent simple sing size skill sleep slide slip slow smart smile smooth soft soil solid song "
    "sort sound source south space speak speed spell spend spin split spot spread spring square stage stand start state stay "
    "step stick stop store story straight strange stream street stretch strike string strong study style sugar swim swing "
    "system take talk task taste teach team tell tend test thank thick thin think throw tide tie tight time tone tool tooth top "
    "total touch tour town trace track trade train treat tree trick trip trust truth try tune turn type union unit use value "
    "view voice vote wait wake walk wall warm wash waste watch wear weight west white whole wide wild will wing wire wise wish "
    "word work world worth wrap write wrong yard year young zone"
).split()
BEFORE = "un re pre dis mis over under out in im inter sub super anti auto micro multi non semi trans co de en fore".split()
BEHIND = (
    "s ed ing er ers or ion ions ation ations ment ments ness less ful able ible al ally ly ity ive ize ized izes ism ist ists "
    "ic ical ish ous ance ence ant ent ary ory ship hood ward wise dom like some way works"
).split()
CODE_WORDS = (
    "main lib util config server client parser lexer model index test setup build data cache store queue worker router "
    "handler service schema types error logger auth session token user order report notes todo draft plan summary log "
    "input output result state event stream buffer table query task job list item page form view style theme script"
).split()
EXTENSIONS = "txt md rs py js ts toml json yaml cfg ini log csv html css sh c h go java".split()
FOLDERS = "src lib docs tests data app bin scripts examples assets config tools internal core notes models web".split()
# What people put into folders beside the names of their own, and is the same everywhere.
USUAL = (
    ".gitignore .git/ .github/ .vscode/ .env .editorconfig LICENSE LICENSE-MIT Makefile Dockerfile CHANGELOG.md "
    "CONTRIBUTING.md ARCHITECTURE.md NOTES.md TODO.md Cargo.lock package-lock.json go.sum build.rs setup.py conftest.py "
    "requirements.txt CMakeLists.txt tsconfig.json node_modules/ target/ dist/ build/ proto/ benches/ vendor/"
).split()
LICENSES = (
    "MIT|Apache-2.0|MIT OR Apache-2.0|BSD-3-Clause|GPL-3.0|GPL-3.0-or-later|MPL-2.0|ISC|Unlicense|LGPL-2.1|CC0-1.0"
).split("|")
# Words that make a line of prose look like one.
PROSE = (
    "a a a an the the the the of of of and and and to to in in for with on by from that this it is is are was be can may "
    "must will not no only also when where which who how if then than as at or but into over under after before while "
    "each every all some more most less new old small large fast slow simple single own other same first last long short "
    "file files line lines text word words name names value values list user users tool tools model program library server "
    "service project command client request answer message system data memory time step test tests code module function "
    "version page table result number part way work works use used uses make makes made run runs read reads write writes "
    "written keep keeps kept take takes give gives get gets set sets see shows shown called means needs written built "
    "you we they your our their its them one two three many few here there now never always about between without because would could should have has had been being do does did done so such any both "
    "either neither another again against already almost although among around away back because become begin behind below "
    "beside best better beyond bring came case certain close come common complete consider contain correct cost current "
    "default describe detail different directly during easy effect else empty enough error even ever every everything exact "
    "example except exist expect explain fact far feature final find follow found full further general give given go goes "
    "good group happen hard help high however idea important include instead inside itself keep kind know later least left "
    "less let like likely limit little local low main many matter maybe might modern much near need next nothing often once "
    "open order outside people perhaps place please plain possible problem produce provide put quick quite rather ready real "
    "reason remain require rest right safe say second seem send several should side similar since size small something "
    "sometimes soon source special start state still stop store support sure system than thing think though thus together "
    "toward true try turn type under unless until usual want way well whether while whole why wide within word world worth "
    "yet agent agents loop backend language small tiny network open database package install build latest release released "
    "license licensed under fast safe simple written framework application web mobile desktop terminal online offline"
).split()
KEYS = (
    "name version owner author license status port host color size region mode level price city email team edition "
    "description title language timeout priority code date phone country format path user key type id rate limit "
    "manager label branch target speed weight height backend model"
).split()


class World:
    """Draws names, values, texts and files of one split."""

    def __init__(self, rng, split, size=1.0, soup=0.03):
        self.rng = rng
        self.heldout = split == "heldout"
        self.size = size
        # How many names are letters without any order, or capitals, whose tokens are single letters.
        self.soup = soup

    # Names and values.

    def pick(self, *options):
        return self.rng.choice(options)

    def chance(self, part):
        return self.rng.random() < part

    def upto(self, low, high):
        """A count, towards `low` in small worlds."""
        return self.rng.randint(low, max(low, round(low + (high - low) * self.size)))

    def ours(self, draw):
        while True:
            name = draw()
            if is_heldout(name) == self.heldout:
                return name

    def syllables(self):
        count = self.rng.choice((1, 2, 2, 2, 3, 3))
        return "".join(self.rng.choice(SYLLABLES) for _ in range(count)) + self.rng.choice(ENDS)

    def scrap(self):
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        return "".join(self.rng.choice(alphabet) for _ in range(self.rng.randint(3, 8)))

    def built(self):
        """A word like those of English: one of its stems, or two, with what can stand around them."""
        stem = self.rng.choice(STEMS)
        kind = self.rng.random()
        if kind < 0.3:
            return stem
        if kind < 0.45:
            return stem + self.rng.choice(STEMS)
        before = self.rng.choice(BEFORE) if kind < 0.7 else ""
        behind = self.rng.choice(BEHIND) if kind > 0.55 else ""
        if behind and behind[0] in "aeiou" and stem[-1] == "e":
            stem = stem[:-1]
        return before + stem + behind

    def word(self):
        """A lower-case word that belongs to the split."""
        kind = self.rng.random()
        if kind < 0.3:
            return self.ours(self.syllables)
        if kind < 0.3 + self.soup:
            return self.ours(self.scrap)
        if kind < 0.6:
            return self.ours(self.built)
        if kind < 0.87:
            return self.ours(lambda: self.rng.choice(WORDS))
        return self.ours(lambda: self.rng.choice(WORDS) + self.rng.choice(WORDS))

    def person(self):
        name = self.word().capitalize()
        return name if self.chance(0.7) else f"{name} {self.word().capitalize()}"

    def identifier(self):
        parts = [self.word() for _ in range(self.rng.choice((1, 2, 2, 3)))]
        style = self.rng.random()
        if style < 0.5:
            return "_".join(parts)
        if style < 0.7:
            return "".join(part.capitalize() for part in parts)
        if style < 0.7 + self.soup:
            return "_".join(parts).upper()
        return parts[0] + str(self.rng.randint(1, 99))

    def stem(self):
        kind = self.rng.random()
        if kind < 0.5:
            return self.word()
        if kind < 0.7:
            return self.word() + self.pick("_", "-") + self.pick(self.word(), self.rng.choice(CODE_WORDS))
        if kind < 0.8:
            return self.rng.choice(CODE_WORDS) + self.pick("_", "-") + self.word()
        if kind < 0.9:
            return self.word() + str(self.rng.randint(1, 99))
        return self.word().capitalize()

    def folder(self):
        kind = self.rng.random()
        if kind < 0.4:
            return self.rng.choice(FOLDERS)
        if kind < 0.78:
            return self.word()
        if kind < 0.94:
            return self.rng.choice(FOLDERS) + "/" + self.word()
        return f"{self.pick(self.rng.choice(FOLDERS), self.word())}/{self.word()}/{self.pick(self.word(), f'v{self.rng.randint(1, 9)}')}"

    def file(self, extension=None):
        return f"{self.stem()}.{extension or self.rng.choice(EXTENSIONS)}"

    def path(self, extension=None):
        name = self.file(extension)
        return name if self.chance(0.5) else f"{self.folder()}/{name}"

    def paths(self, count):
        return self.values(count, self.path)

    def number(self):
        kind = self.rng.random()
        if kind < 0.4:
            return str(self.rng.randint(0, 99))
        if kind < 0.8:
            return str(self.rng.randint(100, 99999))
        return f"{self.rng.randint(0, 999)}.{self.rng.randint(0, 99):02}"

    def version(self):
        return ".".join(str(self.rng.randint(0, 30)) for _ in range(3))

    def value(self):
        kind = self.rng.random()
        if kind < 0.35:
            return self.word()
        if kind < 0.5:
            return self.person()
        if kind < 0.65:
            return self.number()
        if kind < 0.73:
            return self.version()
        if kind < 0.8:
            return f"{self.word()}@{self.word()}.{self.pick('com', 'org', 'net')}"
        if kind < 0.86:
            return f"20{self.rng.randint(10, 39)}-{self.rng.randint(1, 12):02}-{self.rng.randint(1, 28):02}"
        if kind < 0.93:
            return f"{self.word()}-{self.rng.randint(1, 9999)}"
        return self.identifier()

    def values(self, count, draw=None):
        found = []
        while len(found) < count:
            value = (draw or self.value)()
            if value not in found:
                found.append(value)
        return found

    def value_of(self, key):
        """A value for this key: some keys have values of a kind of their own."""
        if key == "version" and self.chance(0.7):
            return self.version()
        if key == "license" and self.chance(0.7):
            return self.rng.choice(LICENSES)
        if key == "edition" and self.chance(0.4):
            return self.pick("2015", "2018", "2021", "2024")
        if key == "description" and self.chance(0.5):
            return self.sentence()
        return self.value()

    def keys(self, count):
        names = self.rng.sample(KEYS, min(count, len(KEYS)))
        return [self.word() + "_" + name if self.chance(0.15) else name for name in names]

    # Texts.

    def sentence(self):
        filler = "the a this that with from for and of in on to is was has near over under very".split()
        words = [
            self.rng.choice(filler) if self.chance(0.45) else self.pick(self.word(), self.rng.choice(WORDS))
            for _ in range(self.rng.randint(3, 10))
        ]
        text = " ".join(words)
        return text[0].upper() + text[1:] + self.pick(".", ".", ".", "!", "")

    def prose(self):
        """A line as it stands in a readme: longer, with marks, code and links in it."""
        words = []
        for _ in range(self.upto(6, self.pick(12, 18, 26))):
            word = self.rng.choice(PROSE) if self.chance(0.65) else self.pick(self.word(), self.rng.choice(WORDS), self.built())
            if self.chance(0.04):
                word = word.capitalize()
            kind = self.rng.random()
            if kind < 0.04:
                word = f"`{self.identifier()}`"
            elif kind < 0.06:
                word = f"**{word}**"
            elif kind < 0.08:
                word = f"({word} {self.word()})"
            elif kind < 0.09:
                word = f"[{word}](https://{self.word()}.{self.pick('com', 'org', 'io')}/{self.word()})"
            elif kind < 0.12:
                word = self.number()
            elif kind < 0.14:
                word = f"{word}-{self.rng.choice(PROSE)}"
            elif kind < 0.15:
                word = word.upper()
            elif kind < 0.16:
                word += " \u2014"
            if self.chance(0.09):
                word += self.pick(",", ",", ",", ":", ";")
            words.append(word)
        text = " ".join(words)
        return text[0].upper() + text[1:] + self.pick(".", ".", ".", "", ":", "!")

    def code(self):
        a, b, c = (self.pick(self.identifier(), self.rng.choice(CODE_WORDS)) for _ in range(3))
        number = self.rng.randint(0, 999)
        indent = self.pick("", "    ", "        ", "  ")
        return self.rng.choice(
            (
                f"use {a}::{b};",
                f"import {a}",
                f"from {a} import {b}",
                f"fn {a}({b}: {c}) {{",
                f"pub fn {a}(&self, {b}: &str) -> Result<{c}, Error> {{",
                f"def {a}({b}, {c}):",
                f"{indent}let {a} = {b}({c});",
                f"{indent}let mut {a} = {b}::new();",
                f"{indent}{a} = {b}.{c}({number})",
                f"{indent}return {a}",
                f"const {a} = require('{b}');",
                f"export function {a}({b}) {{",
                f"{indent}if {a} > {number} {{",
                f"{indent}if not {a}:",
                f"{indent}for {a} in {b}:",
                f"{indent}for (int i = 0; i < {number}; i++) {{",
                f"{indent}Some({a}) => {b},",
                f"{indent}}}",
                "}",
                f"#include <{a}.h>",
                f"pub struct {a} {{",
                f"impl {a} for {b} {{",
                f"class {a}({b}):",
                f"@{a}.{b}",
                f'{indent}assert_eq!({a}, "{b}");',
                f'{indent}raise {a}("{self.word()} {self.word()}")',
                f'{indent}print(f"{a}: {{{b}}}")',
                f"{indent}console.log(`{a} ${{{b}}}`);",
                f"SELECT {a} FROM {b} WHERE {c} = {number};",
                f"// {self.sentence()}",
                f"/// {self.prose()}",
                f"# {self.sentence()}",
                f'"""{self.sentence()}"""',
                f"    {a}.{b}({c}, {number % 10});",
                f"export {a}={b}",
                f'echo "${{{a}}}" | {b} > {c}',
                f'<div class="{a}">{b}</div>',
            )
        )

    def line(self):
        kind = self.rng.random()
        if kind < 0.35:
            return self.sentence()
        if kind < 0.45:
            return self.prose()
        if kind < 0.8:
            return self.code()
        if kind < 0.87:
            return f"- {self.sentence()}"
        if kind < 0.94:
            return f"{self.pick(self.word(), self.rng.choice(KEYS))}: {self.pick(self.sentence(), self.word() + ' ' + self.word())}"
        return ", ".join(self.word() for _ in range(self.rng.randint(2, 5)))

    def title(self):
        return "# " + " ".join(self.word() for _ in range(self.rng.randint(1, 3)))

    def text(self, low=1, high=9):
        """Lines of which the first is not empty."""
        kind = self.rng.random()
        if kind < 0.2:
            return self.readme(low, high)
        if kind < 0.3:
            return [self.code().strip()] + [self.code() for _ in range(self.upto(low, high) - 1)]
        lines = [self.title() if self.chance(0.4) else self.line().strip()]
        for _ in range(self.upto(low, high) - 1):
            lines.append("" if self.chance(0.12) else self.line())
        return lines

    def readme(self, low=1, high=9):
        lines = [self.title() if self.chance(0.8) else self.prose()]
        while len(lines) < self.upto(low + 1, high):
            if self.chance(0.75):
                lines.append("")
            kind = self.rng.random()
            if kind < 0.6 or len(lines) < 3:
                lines += [self.prose() for _ in range(self.rng.randint(1, 3))]
            elif kind < 0.75:
                lines += [self.pick("-", "*", "1.") + " " + self.prose() for _ in range(self.rng.randint(1, 3))]
            elif kind < 0.85:
                lines += ["```" + self.pick("sh", "", "rust", "python"), self.code(), "```"]
            elif kind < 0.9:
                lines += ["| " + self.word() + " | " + self.word() + " |", "| --- | --- |"]
            else:
                lines.append("#" + self.title())
        return lines

    def settings(self, pairs, style=None):
        """The lines of a file of settings."""
        style = self.rng.randrange(7) if style is None else style
        lines = []
        if style == 0:
            body = [f'  "{key}": "{value}"' for key, value in pairs]
            return ["{"] + [line + "," for line in body[:-1]] + [body[-1], "}"]
        for key, value in pairs:
            lines.append(
                (
                    f'{key} = "{value}"',
                    f'{key} = "{value}"',
                    f"{key}: {value}",
                    f"{key} = {value}",
                    f"{key}={value}",
                    f"{key.upper()}={value}",
                    f'{key}: "{value}"',
                )[style]
            )
        if style in (1, 3) and self.chance(0.7):
            lines.insert(0, f"[{self.pick('package', 'project', 'server', self.word())}]")
            if len(pairs) > 3 and self.chance(0.4):
                lines.insert(self.rng.randint(3, len(lines)), f"\n[{self.word()}]")
        if style in (2, 4) and self.chance(0.3):
            lines.insert(0, f"# {self.sentence()}")
        return lines

    def manifest(self, name, pairs):
        """The lines of a project's manifest, with what it depends on behind the pairs."""
        json_like = name.endswith(".json")
        if self.chance(0.5):
            known = {key for key, _ in pairs}
            also = [("edition", "2021"), ("rust-version", f"1.{self.rng.randint(50, 99)}"), ("default-run", self.stem())]
            also += [("description", self.sentence()), ("repository", f"https://{self.word()}.com/{self.word()}")]
            also = [pair for pair in self.rng.sample(also, self.rng.randint(1, 4)) if pair[0] not in known]
            pairs = pairs + also
        lines = self.settings(pairs, 0 if json_like else 1)
        needed = [(self.stem(), self.version() if self.chance(0.5) else f"{self.rng.randint(0, 30)}.{self.rng.randint(0, 30)}") for _ in range(self.upto(0, self.pick(4, 4, 12)))]
        if not needed:
            return lines
        if json_like:
            lines[-2] += ","
            lines[-1:] = [f'  "{self.pick("dependencies", "devDependencies")}": {{']
            lines += [f'    "{key}": "^{value}.0"' + ("," if key != needed[-1][0] else "") for key, value in needed]
            return lines + ["  }", "}"]
        if self.chance(0.25):
            lines += ["", "[features]"]
            for _ in range(self.upto(1, 4)):
                if self.chance(0.4):
                    lines.append(f"# {self.sentence()}")
                lines.append(f'{self.word()} = ["{self.word()}", "{self.word()}/{self.word()}"]')
        lines += ["", self.pick("[dependencies]", "[dependencies]", "[dev-dependencies]", "[tool.dependencies]")]
        for key, value in needed:
            if self.chance(0.3):
                lines.append(f"# {self.sentence()}")
            kind = self.rng.random()
            if kind < 0.15:
                lines.append(f'{key} = {{ version = "{value}", default-features = false }}')
            elif kind < 0.4:
                features = ", ".join(f'"{self.word()}"' for _ in range(self.rng.randint(1, 3)))
                lines.append(f'{key} = {{ version = "{value}", features = [{features}] }}')
            elif kind < 0.5:
                lines.append(f'{key} = {{ path = "{self.folder()}" }}')
            else:
                lines.append(f'{key} = "{value}"')
        return lines

    def pairs(self, low=1, high=8):
        keys = self.keys(self.upto(low, high))
        return [(key, self.value_of(key)) for key in keys]

    def listing(self, names):
        """What list_dir says of these names, sorted as it sorts them."""
        lines = []
        for name in sorted(names):
            size = self.rng.choice((self.rng.randint(0, 999), self.rng.randint(1000, 99999)))
            lines.append(name if name.endswith("/") else f"{name} ({size} bytes)")
        return "\n".join(lines) + "\n" if lines else "(empty)\n"

    def entries(self, low, high, *also):
        names = set(also)
        if self.chance(0.35):
            names |= set(self.rng.sample(["README.md", "Cargo.toml", "package.json", "README.txt"], self.rng.randint(1, 2)))
        for _ in range(self.upto(low, high)):
            kind = self.rng.random()
            if kind < 0.3:
                names.add(self.folder().split("/")[0] + "/")
            elif kind < 0.48:
                names.add(self.rng.choice(USUAL))
            else:
                names.add(self.file())
        return sorted(names)


# About as many bytes as `hotloop agent` takes of an output for a model of this context.
BYTES_MAX = 1000


def shown(lines, more=0):
    """What read_file says of these lines: all of a file, or its first ones."""
    kept, size = [], 0
    for line in lines:
        size += len(line) + 1
        if kept and size > BYTES_MAX:
            break
        kept.append(line)
    more += len(lines) - len(kept)
    text = "\n".join(kept) + "\n"
    if more:
        text += f"[lines 1 to {len(kept)} of {len(kept) + more}; go on with first_line {len(kept) + 1}]"
    return text
