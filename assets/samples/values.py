"""Values for the slots of the redaction clauses: names, addresses, dates and numbers, in as many formats as people write.

Names, cities and streets are Faker's by locale, or invented from syllables, so that no model can learn a list. A value
belongs to the side `train` or `held` by a hash of itself; the two sides never share a name, city or street.
Patterns: # a digit, % a digit but 0, ? a capital letter, * a small letter, ^ a capital letter or digit.
"""

import random
import string
import unicodedata
import zlib

LANGUAGES = ("en", "de", "nl", "fr", "es", "it")
SPLIT_CLASSES = ("GIVENNAME", "SURNAME", "CITY", "STREET")  # sides share no value of these
LOCALES = {
    "en": ("en_US", "en_GB", "en_IN"),
    "de": ("de_DE", "de_AT"),
    "nl": ("nl_NL", "nl_BE"),
    "fr": ("fr_FR", "fr_CH"),
    "es": ("es_ES", "es_MX"),
    "it": ("it_IT",),
    "other": ("pl_PL", "pt_PT", "tr_TR", "sv_SE", "hr_HR", "ro_RO", "id_ID"),
}
MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
}
DATES = (
    "{d:02}-{m:02}-{y}",
    "{d:02}/{m:02}/{y}",
    "{d:02}.{m:02}.{y}",
    "{y}-{m:02}-{d:02}",
    "{y}/{m:02}/{d:02}",
    "{d}/{m}/{y}",
    "{d}.{m}.{y}",
    "{d:02}-{m:02}-{yy}",
    "{d:02}/{m:02}/{yy}",
    "{y}-{m:02}-{d:02}T00:00:00",
    "{d:02}-{S}-{y}",
    "{d} {S} {y}",
)
LOCAL_DATES = {
    "en": (
        "{M} {d}, {y}",
        "{M} {o}, {y}",
        "{o} of {M} {y}",
        "{o} {M} {y}",
        "{d} {M} {y}",
        "{S} {d}, {y}",
        "{m}/{d}/{y}",
    ),
    "de": ("{d}. {M} {y}", "{d}. {S} {y}", "{d}. {m}. {y}", "{d}.{m:02}.{y}", "{d}. {M} '{yy}"),
    "nl": ("{d} {M} {y}", "{d} {S}. {y}", "{d}-{m}-{y}", "{d} {M} '{yy}"),
    "fr": ("{d} {M} {y}", "{first} {M} {y}", "{d} {S}. {y}", "{d} {M} {yy}"),
    "es": ("{d} de {M} de {y}", "{d} de {M} del {y}", "{d} {M} {y}", "{d}/{S}/{y}", "{d}-{S}-{yy}"),
    "it": ("{d} {M} {y}", "{first} {M} {y}", "{d} {S} {y}", "{d} {M} '{yy}"),
}
VAGUE_DATES = ("{M}/{yy}", "{M} {y}", "{S}/{yy}", "{S} {y}")  # a birth date may lack its day
NO_YEAR = {
    "en": ("{M} {d}", "{d} {M}", "{M} {o}"),
    "de": ("{d}. {M}",),
    "nl": ("{d} {M}",),
    "fr": ("{d} {M}",),
    "es": ("{d} de {M}",),
    "it": ("{d} {M}",),
}

PHONES = {
    "en": (
        "(%##) ###-####",
        "%##-###-####",
        "+1 %## ### ####",
        "+1-%##-###-####",
        "%##.###.####",
        "020 7### ####",
        "07### ######",
        "+44 7### ######",
        "+44 (0)20 7### ####",
        "+91 9#### #####",
        "0%### ######",
        "%##-###-####x%###",
        "1 (%##) ###-####",
    ),
    "de": (
        "0%## #######",
        "+49 1%# #######",
        "0%##/######",
        "(0%###) ######",
        "+49 (0) %## ######",
        "01%#-#######",
        "0043 %## ######",
        "+43 6%# ### ####",
        "030 ########",
        "0170########",
        "0%## - ## ## ##",
    ),
    "nl": (
        "06-########",
        "06 ## ## ## ##",
        "+31 6 ########",
        "0%#-#######",
        "(0%#) ### ## ##",
        "0031 6########",
        "+32 4%# ## ## ##",
        "04%#/##.##.##",
        "+31(0)%# ### ####",
    ),
    "fr": (
        "0% ## ## ## ##",
        "0%########",
        "+33 % ## ## ## ##",
        "0%.##.##.##.##",
        "+33 (0)% ## ## ## ##",
        "06-##-##-##-##",
        "+41 %# ### ## ##",
        "0033 % ########",
        "0%## ## ## ##",
    ),
    "es": (
        "6## ### ###",
        "9%# ## ## ##",
        "+34 6## ## ## ##",
        "+34 9########",
        "(+34) 9%# ### ###",
        "6##-###-###",
        "0034 6## ### ###",
        "+52 55 #### ####",
        "55-####-####",
        "6########",
    ),
    "it": (
        "3%# #######",
        "+39 3%# ### ####",
        "0%-########",
        "0%# ######",
        "+39 0%# #######",
        "333.#######",
        "0039 3%#######",
        "3%#/#######",
        "(0%#) #######",
    ),
}
ZIPCODES = {
    "en": ("%####", "%####", "%####-####", "??% %??", "?%# %??", "%#####", "?#? #?#"),
    "de": ("%####", "%####", "D-%####", "%###"),
    "nl": ("%### ??", "%###??", "%### ??", "%###"),
    "fr": ("%####", "%####", "F-%####", "%###"),
    "es": ("%####", "0%###", "%####"),
    "it": ("%####", "0%###", "I-%####"),
}
IBANS = {
    "en": ("GB## ???? #### #### #### ##",),
    "de": ("DE## #### #### #### #### ##", "AT## #### #### #### ####"),
    "nl": ("NL## ???? #### #### ##", "BE## #### #### ####"),
    "fr": ("FR## #### #### #### #### #### ###", "CH## #### #### #### #### #"),
    "es": ("ES## #### #### #### #### ####",),
    "it": ("IT## ? ##### ##### ############",),
}
ACCOUNTS = (
    "########",
    "%#########",
    "%###########",
    "###-######-#",
    "%#.###.###",
    "##-##-## ########",
    "?-%####",
    "%##-#######-##",
    "KD%#####",
)
CARDS = (
    "4### #### #### ####",
    "5%## #### #### ####",
    "6011 #### #### ####",
    "4###############",
    "5%##############",
    "37## ###### #####",
    "34#############",
    "4###-####-####-####",
    "5%##-####-####-####",
    "3%## ###### ####",
    "%###############",
    "4###.####.####.####",
)
IDCARDS = {
    "en": ("%########", "?########", "?%#######", "??######", "### ### ###"),
    "de": ("L^^^^^^^^", "?^^^^^^^%", "C%^^^?^##", "T########"),
    "nl": ("?????####", "??^^^^^^#", "SPEC%###"),
    "fr": ("############", "##??#####", "##? ######", "?^^^^^^^#"),
    "es": ("########?", "########-?", "##.###.###-?", "?#######?"),
    "it": ("??#####??", "?? #######", "?? #####??"),
}
SOCIALS = {
    "en": ("###-##-####", "### ## ####", "?? ## ## ## ?", "??######?", "#########"),
    "de": ("## %#%### ? ###", "##%#%###?###", "#### ######"),
    "nl": ("#########", "####.##.###", "### ### ###", "##.##.##-###.##"),
    "fr": ("% ## ## ## ### ### ##", "%##############", "756.####.####.##"),
    "es": ("##/########/##", "## ######## ##", "###########", "##-##-##-####-#"),
    "it": ("%#########", "??????##?##?###?", "##########/##"),
}
TAXES = {
    "en": ("##-#######", "##########", "##### #####", "9##-##-####", "?????####?", "GB ### #### ##"),
    "de": ("## ### ### ###", "###########", "##/###/#####", "DE#########", "###/####/####"),
    "nl": ("NL#########B##", "#########", "####.##.###.B.##", "##.##.##.###"),
    "fr": ("## ## ### ### ###", "#############", "FR## #########", "CHE-###.###.###"),
    "es": ("########?", "?########", "????######^^^", "ES?########", "B-########"),
    "it": ("??????##?##?###?", "IT###########", "###########", "?????? ##?## ?###?"),
}
LICENSES = {
    "en": ("?#######", "????######??#??", "?###-####-####", "#########", "?##-##-####"),
    "de": ("?###^^^##^^", "?##^^^^^##?", "########"),
    "nl": ("##########", "### ### ####", "#### ### ###"),
    "fr": ("##??#####", "############", "## ?? #####"),
    "es": ("########-?", "########?", "???########"),
    "it": ("U1?#####??", "??#######?", "?%#######?"),
}
ANY_ID = (
    "#########",
    "%#######",
    "########?",
    "??#######",
    "?? ######",
    "####-####",
    "^^^^^^^^^",
    "??-######",
    "###.###.###",
    "?###########",
    "####/##/####",
)
CODES = (
    "#%####",
    "INV-20##-0###",
    "?? ####",
    "?-%###",
    "PO%#####",
    "%####/##",
    "RE-%####",
    "??###",
    "T-%#####",
    "???-%###",
    "No. %####",
    "#%###-?",
)
BUILDINGS = (
    "%",
    "%",
    "%#",
    "%#",
    "%#",
    "%##",
    "%###",
    "%#?",
    "%#*",
    "%*",
    "%# ?",
    "%-%",
    "%#-%#",
    "%/%",
    "%#/?",
)
BIS = {
    "fr": ("% bis", "%# bis", "%# ter"),
    "it": ("%/bis", "%# bis"),
    "nl": ("%#-%#", "%#-hs", "%#bis"),
    "de": ("%# %/%", "%# * - *"),
}
PRICES = {
    "en": ("$%#.##", "£%##", "€%#", "$%,%##", "%# dollars", "£%.##"),
    "de": ("%#,## €", "%## Euro", "€ %#,##", "%.%## €"),
    "nl": ("€ %#,##", "€%##", "%# euro", "€ %.%##,-"),
    "fr": ("%#,## €", "%## euros", "% %## €", "%#€"),
    "es": ("%#,## €", "%## euros", "%.%## €", "%#€"),
    "it": ("€ %#,##", "%## euro", "%.%## €", "%#,## €"),
}
PERCENTS = {
    "en": ("%#%%", "%.#%%"),
    "de": ("%# %%", "%,# %%"),
    "nl": ("%#%%", "%,#%%"),
    "fr": ("%# %%", "%,# %%"),
    "es": ("%# %%", "%,# %%"),
    "it": ("%#%%", "%,#%%"),
}

GIVEN_ENDS = {
    "en": "y son lyn ie ett a an wen",
    "de": "a e bert lind wig fried ke hild",
    "nl": "je ke a bert ijn line o ius",
    "fr": "ette ine ien el anne ot aud ie",
    "es": "ita o a ino asi encio uel ana",
    "it": "ella ino a o etta enzo ia ardo",
}
SURNAME_ENDS = {
    "en": "ton ley ford er well by worth s",
    "de": "mann berg feld er ling bauer ke hoff",
    "nl": "stra sma huis dijk veld man kamp ink",
    "fr": "ard eau ier illon et ois oux in",
    "es": "ez ado ara illa ero ales ón és",
    "it": "elli ini one etti aro acci i uzzo",
}
CITY_ENDS = {
    "en": "ton ville bury ford field mouth ham port",
    "de": "burg stadt hausen ingen heim dorf au bach",
    "nl": "dam veen drecht hoven broek um dorp zijl",
    "fr": "ville y court ac ange mont illac s-sur-Orne",
    "es": "eda osa ares ejo illas os uela ún",
    "it": "ano asco ate igliano eto ara anza ello",
}
PARTICLES = {
    "en": ("O'", "Mc", "Mac"),
    "de": ("von ", "von der ", "zu "),
    "nl": ("van ", "van de ", "van der ", "de ", "van den ", "ter ", "van 't "),
    "fr": ("de ", "Le ", "La ", "du ", "d'"),
    "es": ("de la ", "del ", "de "),
    "it": ("De ", "Di ", "D'", "Lo ", "La ", "Della "),
}
PARTICLE_SHARE = {"en": 0.04, "de": 0.05, "nl": 0.3, "fr": 0.08, "es": 0.06, "it": 0.1}
CITIES = {  # where Faker's cities are made up
    "en": "London,Leeds,Bristol,York,Cardiff,Belfast,Dublin,Boston,Chicago,Denver,Seattle,Austin,New York,Los Angeles,Toronto,"
    "Sydney,Perth,Portland,Glasgow,Oxford,Newcastle upon Tyne,San Diego,Salt Lake City,Plymouth,Bath,Houston,Phoenix,Mumbai,"
    "Nairobi,Stratford-upon-Avon",
    "fr": "Paris,Lyon,Marseille,Lille,Nantes,Rennes,Dijon,Toulouse,Bordeaux,Nice,Grenoble,Angers,Le Havre,Saint-Étienne,La Rochelle,"
    "Genève,Lausanne,Bruxelles,Namur,Aix-en-Provence,Le Mans,Brest,Tours,Metz,Avignon,Clermont-Ferrand,Pau,Annecy,Fribourg,"
    "Montréal",
    "es": "Madrid,Barcelona,Sevilla,Bilbao,Zaragoza,Granada,Málaga,Vigo,Las Palmas,Palma,San Sebastián,Ciudad de México,Guadalajara,"
    "Puebla,Bogotá,Lima,Buenos Aires,Rosario,Montevideo,Quito,Alcalá de Henares,Gijón,Cádiz,Mérida,Burgos,Lugo,Elche,Tijuana,"
    "Sabadell,Santa Cruz de Tenerife",
}
STREETS = {
    "en": (
        "{} Street",
        "{} Road",
        "{} Lane",
        "{} Ave",
        "{} St",
        "{} Close",
        "{} Drive",
        "Old {} Road",
        "{} Blvd.",
        "{} Court",
    ),
    "de": (
        "{}straße",
        "{}str.",
        "{}weg",
        "{}gasse",
        "Am {}",
        "{}allee",
        "{}-Straße",
        "{} Platz",
        "An der {}",
        "{}ring",
    ),
    "nl": (
        "{}straat",
        "{}laan",
        "{}weg",
        "{}plein",
        "{}kade",
        "Laan van {}",
        "{}dijk",
        "{}hof",
        "Burg. {}straat",
    ),
    "fr": (
        "rue {}",
        "rue de {}",
        "avenue {}",
        "bd {}",
        "impasse {}",
        "place {}",
        "chemin de {}",
        "allée {}",
        "Rue du {}",
        "quai {}",
    ),
    "es": (
        "Calle {}",
        "Calle de {}",
        "C/ {}",
        "Avenida {}",
        "Avda. de {}",
        "Plaza {}",
        "Paseo de {}",
        "Camino de {}",
        "calle {}",
    ),
    "it": (
        "Via {}",
        "Via {}",
        "via {}",
        "Viale {}",
        "Corso {}",
        "Piazza {}",
        "Vicolo {}",
        "Largo {}",
        "V.le {}",
    ),
}
MAIL_DOMAINS = (
    "gmail.com",
    "yahoo.com",
    "outlook.com",
    "hotmail.com",
    "aol.com",
    "proton.me",
    "icloud.com",
    "tutanota.com",
)
DOMAIN_ENDS = {
    "en": "com co.uk org net us io",
    "de": "de at com ch",
    "nl": "nl be eu com",
    "fr": "fr ch com org",
    "es": "es com mx cat",
    "it": "it com eu net",
}
WORDS = "sun tiger coffee river moon pixel rocket maple wolf ninja blue shadow happy lucky green storm silver panda turbo music".split()
ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s st t tr v w z sch".split()
NUCLEI = "a e i o u a e i o ai ea ie ou au".split()
CODAS = ["", "", "", "l", "n", "r", "s", "m", "nd", "rt", "st", "ck"]


def side_of(slot: str, value: str) -> str:
    """The side of a value, by a hash without case and accents: of a name's last word, of a whole city or street."""
    plain = unicodedata.normalize("NFKD", value.casefold()).encode("ascii", "ignore").decode()
    if slot in ("GIVENNAME", "SURNAME"):
        plain = plain.replace("-", " ").replace("'", " ").split()[-1:]
    return "held" if zlib.crc32("".join(plain).encode()) % 4 == 0 else "train"


def load_fakers(seed: int) -> dict:
    """One seeded Faker for each locale. Raises ImportError with the remedy if Faker is not installed."""
    try:
        from faker import Faker
    except ImportError as error:
        raise ImportError(
            "make_pairs needs Faker for its names and addresses: pip install -e .[data]"
        ) from error
    fakers = {}
    for number, locale in enumerate(sum(LOCALES.values(), ())):
        fakers[locale] = Faker(locale, use_weighting=False)
        fakers[locale].seed_instance(seed * 1000 + number)
        for provider in fakers[locale].get_providers():
            if locale == "it_IT" and hasattr(provider, "cities"):
                provider.cities = sorted(
                    provider.cities
                )  # a list made from a set: another order in each process
    return fakers


def fill_pattern(rng: random.Random, pattern: str) -> str:
    """Replace the signs of a pattern (see the top of this file) by random characters; %% is a per cent sign."""
    signs = {
        "#": string.digits,
        "%": "123456789",
        "?": string.ascii_uppercase,
        "*": string.ascii_lowercase,
        "^": string.ascii_uppercase + string.digits,
    }
    parts = ("".join(rng.choice(signs[c]) if c in signs else c for c in part) for part in pattern.split("%%"))
    return "%".join(parts)


class Values:
    """Draws values of one language from one side; `draw(slot)` serves every slot of the clauses."""

    def __init__(self, language: str, side: str, rng: random.Random, fakers: dict):
        self.language, self.side, self.rng, self.fakers = language, side, rng, fakers
        self.names: list[
            str
        ] = []  # given names and surnames of the text at hand, for its addresses and user names

    def draw(self, slot: str) -> str:
        """A value for a slot such as GIVENNAME or price; raises KeyError for a slot that is not known."""
        if slot in SPLIT_CLASSES:
            value = self._of_side(slot, getattr(self, f"_{slot.lower()}"))
            if slot in ("GIVENNAME", "SURNAME"):
                self.names.append(value)
            return value
        tables = {"TELEPHONENUM": PHONES, "ZIPCODE": ZIPCODES, "PRICE": PRICES, "PERCENT": PERCENTS}
        identities = {
            "IDCARDNUM": IDCARDS,
            "SOCIALNUM": SOCIALS,
            "TAXNUM": TAXES,
            "DRIVERLICENSENUM": LICENSES,
        }
        if slot.upper() in tables:
            return self._pattern(tables[slot.upper()][self._country(0.08 if slot.isupper() else 0)])
        if slot in identities:
            return self._pattern(ANY_ID if self.rng.random() < 0.2 else identities[slot][self._country(0.1)])
        return {
            "IBAN": self._iban,
            "BUILDINGNUM": self._building,
            "DATEOFBIRTH": self._birth,
            "EMAIL": self._email,
            "USERNAME": self._username,
            "PASSWORD": self._password,
            "ACCOUNTNUM": self._account,
            "CREDITCARDNUMBER": lambda: self._pattern(CARDS),
            "date": self._date,
            "time": self._time,
            "number": self._number,
            "code": lambda: self._pattern(CODES),
            "year": lambda: str(self.rng.randint(1990, 2030)),
        }[slot]()

    def _pattern(self, patterns) -> str:
        return fill_pattern(self.rng, self.rng.choice(patterns))

    def _country(self, foreign: float) -> str:
        return self.rng.choice(LANGUAGES) if self.rng.random() < foreign else self.language

    def _faker(self, foreign: float = 0.12):
        group = self.language
        if self.rng.random() < foreign:
            group = self.rng.choice(("other", *LANGUAGES))
        return self.fakers[self.rng.choice(LOCALES[group])]

    def _of_side(self, slot: str, draw) -> str:
        while True:
            value = " ".join(draw().split())
            if side_of(slot, value) == self.side:
                return value

    def _invented(self, ends: dict[str, str]) -> str:
        rng = self.rng
        stem = "".join(rng.choice(ONSETS) + rng.choice(NUCLEI) for _ in range(rng.choice((1, 1, 1, 2))))
        ending = rng.choice(ends[self.language].split())
        joint = "" if ending[0] in "aeiouyóéú" else rng.choice(CODAS)
        if ending[0] in "aeiouyóéú":
            joint = rng.choice("l n r s t d m nd rt lv z".split())
        return (
            (stem + joint + ending).capitalize() if "-" not in ending else stem.capitalize() + joint + ending
        )

    def _givenname(self) -> str:
        rng = self.rng
        name = self._of_side("GIVENNAME", self._one_givenname)
        if rng.random() < 0.06 and " " not in name:
            return name + rng.choice((" ", "-")) + self._of_side("GIVENNAME", self._one_givenname)
        return name

    def _one_givenname(self) -> str:
        return self._invented(GIVEN_ENDS) if self.rng.random() < 0.33 else self._faker().first_name()

    def _surname(self) -> str:
        rng, name = self.rng, self._of_side("SURNAME", self._one_surname)
        if rng.random() < PARTICLE_SHARE[self.language] and " " not in name and "'" not in name:
            return rng.choice(PARTICLES[self.language]) + name
        if self.language == "es" and rng.random() < 0.5:
            return name + " " + self._of_side("SURNAME", self._one_surname)
        if rng.random() < 0.05 and "-" not in name:
            return name + "-" + self._of_side("SURNAME", self._one_surname)
        return name

    def _one_surname(self) -> str:
        return self._invented(SURNAME_ENDS) if self.rng.random() < 0.33 else self._faker().last_name()

    def _city(self) -> str:
        if self.language in CITIES and self.rng.random() < 0.25:
            return self.rng.choice(CITIES[self.language].split(","))
        return self._invented(CITY_ENDS) if self.rng.random() < 0.25 else self._faker(0.15).city()

    def _street(self) -> str:
        rng = self.rng
        if rng.random() < 0.4:
            return self._faker(0.08).street_name()
        if rng.random() < 0.04:
            return self._numbered_street()
        stem = rng.choice((self._one_surname, self._city, lambda: self._invented(CITY_ENDS)))()
        return rng.choice(STREETS[self.language]).format(stem)

    def _numbered_street(self) -> str:
        number, month = self.rng.randint(1, 30), self.rng.choice(MONTHS[self.language].split())
        return {
            "en": f"{_ordinal(number)} Avenue",
            "de": f"Straße des {number}. {month}",
            "nl": f"{number}e Dwarsstraat",
            "fr": f"rue du {number} {month}",
            "es": f"Calle {number} de {month}",
            "it": f"Via {number} {month.capitalize()}",
        }[self.language]

    def _building(self) -> str:
        special = BIS.get(self.language)
        return self._pattern(special if special and self.rng.random() < 0.08 else BUILDINGS)

    def _account(self) -> str:
        return self._pattern(ACCOUNTS) if self.rng.random() < 0.45 else self._iban()

    def _iban(self) -> str:
        iban = self._pattern(IBANS[self._country(0.15)])
        return iban.replace(" ", "") if self.rng.random() < 0.45 else iban

    def _birth(self) -> str:
        formats = VAGUE_DATES if self.rng.random() < 0.08 else self._date_formats()
        return self._dated(self.rng.choice(formats), self.rng.randint(1928, 2023))

    def _date(self) -> str:
        formats = NO_YEAR[self.language] if self.rng.random() < 0.35 else self._date_formats()
        return self._dated(self.rng.choice(formats), self.rng.randint(2009, 2029))

    def _date_formats(self):
        return LOCAL_DATES[self.language] if self.rng.random() < 0.55 else DATES

    def _dated(self, style: str, year: int) -> str:
        day, month = self.rng.randint(1, 28), self.rng.randint(1, 12)
        if "{first}" in style:
            day = 1
        name = MONTHS[self.language].split()[month - 1]
        return style.format(
            d=day,
            m=month,
            y=year,
            yy=f"{year % 100:02}",
            M=name,
            S=name[:3],
            o=_ordinal(day),
            first={"fr": "1er", "it": "1°"}.get(self.language, "1"),
        )

    def _time(self) -> str:
        hour, minute = self.rng.randint(6, 22), self.rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
        twelve = (hour - 1) % 12 + 1
        styles = [f"{hour}:{minute:02}", f"{hour:02}:{minute:02}"]
        styles += {
            "en": [
                f"{twelve}:{minute:02} {'pm' if hour > 11 else 'am'}",
                f"{twelve}{'pm' if hour > 11 else 'am'}",
            ],
            "de": [f"{hour}:{minute:02} Uhr", f"{hour} Uhr"],
            "fr": [f"{hour}h{minute:02}", f"{hour} h"],
            "nl": [f"{hour}.{minute:02} uur"],
            "es": [f"{hour}:{minute:02} h"],
            "it": [f"{hour}.{minute:02}"],
        }[self.language]
        return self.rng.choice(styles)

    def _number(self) -> str:
        return str(self.rng.randint(2, self.rng.choices((12, 60, 900), (6, 3, 1))[0]))

    def _handles(self) -> list[str]:
        """Two words for an address: the names of this text if it has any, else new ones."""
        names = [_plain(name) for name in self.names] if self.rng.random() < 0.65 else []
        names = [name for name in names if name]
        while len(names) < 2:
            names.append(
                _plain(self._givenname() if not names else self._of_side("SURNAME", self._one_surname)) or "x"
            )
        return names[:2]

    def _email(self) -> str:
        rng, (first, last) = self.rng, self._handles()
        local = rng.choice(
            (
                f"{first}.{last}",
                f"{first[0]}.{last}",
                f"{first[0]}{last}",
                f"{first}{last}",
                f"{first}_{last}",
                f"{last}.{first}",
                f"{first}{rng.randint(1, 99)}",
                f"{last}{rng.randint(1950, 2015)}",
                f"{first}-{last}",
                f"{first}+{rng.choice(WORDS)}",
                fill_pattern(rng, "****##"),
                f"{rng.choice(WORDS)}.{rng.choice(WORDS)}{rng.randint(1, 99)}",
            )
        )
        own = _plain(self._invented(SURNAME_ENDS)) + rng.choice(("", "", f"-{rng.choice(WORDS)}"))
        domain = (
            rng.choice(MAIL_DOMAINS)
            if rng.random() < 0.4
            else f"{own}.{rng.choice(DOMAIN_ENDS[self.language].split())}"
        )
        address = f"{local}@{domain}"
        return address.upper() if rng.random() < 0.03 else address

    def _username(self) -> str:
        rng, (first, last) = self.rng, self._handles()
        name = rng.choice(
            (
                fill_pattern(rng, "*" * rng.randint(4, 8) + "#" * rng.randint(2, 6)),
                f"{first[0]}.{last}_{rng.randint(1, 99)}",
                f"{first}{last[0]}",
                f"{first}.{last}",
                f"{first}_{rng.randint(60, 2012)}",
                f"{rng.choice(WORDS)}{first.capitalize()}",
                f"{rng.choice(WORDS)}_{rng.choice(WORDS)}{rng.randint(1, 999)}",
                f"x{first}x",
                fill_pattern(rng, "##*****"),
                f"{first[:3]}{last[:4]}{rng.randint(1, 99):02}",
                f"{rng.randint(10, 99)}{last}",
                f"{last.capitalize()}{first[0].upper()}",
            )
        )
        return "@" + name if rng.random() < 0.04 else name

    def _password(self) -> str:
        rng, signs = self.rng, "!#$%*+-=?@_~"
        word = rng.choice(
            (rng.choice(WORDS), _plain(self._invented(SURNAME_ENDS)), _plain(self._invented(CITY_ENDS)))
        )
        letters = string.ascii_letters + string.digits + signs
        noise = "".join(rng.choice(letters) for _ in range(rng.randint(7, 13))) + rng.choice(
            string.ascii_letters
        )
        return rng.choice(
            (
                noise,
                noise,
                f"{word.capitalize()}{rng.randint(1, 2024)}{rng.choice('!#$*+')}",
                f"{word}{rng.randint(10, 9999)}",
                f"{word}-{rng.choice(WORDS)}-{rng.randint(1, 99)}",
                word.translate(str.maketrans("aeios", "4310$")) + str(rng.randint(1, 999)),
                f"{rng.choice(signs)}{word}{rng.choice(signs)}{rng.randint(1, 99)}",
                f"{word.upper()}_{rng.choice(WORDS)}{rng.randint(1, 99)}",
            )
        )


def _ordinal(number: int) -> str:
    suffix = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def _plain(name: str) -> str:
    """A name as it stands in an address: the last word in small ASCII letters."""
    words = (
        unicodedata.normalize("NFKD", name.casefold().replace("ı", "i").replace("ł", "l"))
        .encode("ascii", "ignore")
        .decode()
    )
    return "".join(c for c in words.split()[-1] if c.isalnum()) if words.split() else ""
