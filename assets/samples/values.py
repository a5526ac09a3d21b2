"""Values for the slots of the redaction clauses: names, addresses, dates and numbers in many formats.

Names, cities and streets come from Faker by locale, or are made of syllables, so that no model can learn a
list. The hash of a value decides whether it is on the side `train` or `held`; the two sides share no name,
city or street. In a pattern, # is a digit, % a digit but 0, ? an upper-case letter, * a lower-case letter, ^
an upper-case letter or digit, and %% a per cent sign.
"""

import random
import string
import unicodedata
import zlib

LANGUAGES = ("en", "de", "nl", "fr", "es", "it")
# The two sides share no value of these classes.
SPLIT_CLASSES = ("GIVENNAME", "SURNAME", "CITY", "STREET")
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
    "{d:02}-{m:02}-{y}|{d:02}/{m:02}/{y}|{d:02}.{m:02}.{y}|{y}-{m:02}-{d:02}|{y}/{m:02}/{d:02}|{d}/{m}/{y}|"
    "{d}.{m}.{y}|{d:02}-{m:02}-{yy}|{d:02}/{m:02}/{yy}|{y}-{m:02}-{d:02}T00:00:00|{d:02}-{S}-{y}|{d} {S} {y}"
).split("|")
LOCAL_DATES = {
    "en": ("{M} {d}, {y}|{M} {o}, {y}|{o} of {M} {y}|{o} {M} {y}|{d} {M} {y}|{S} {d}, {y}|{m}/{d}/{y}").split(
        "|"
    ),
    "de": ("{d}. {M} {y}", "{d}. {S} {y}", "{d}. {m}. {y}", "{d}.{m:02}.{y}", "{d}. {M} '{yy}"),
    "nl": ("{d} {M} {y}", "{d} {S}. {y}", "{d}-{m}-{y}", "{d} {M} '{yy}"),
    "fr": ("{d} {M} {y}", "{first} {M} {y}", "{d} {S}. {y}", "{d} {M} {yy}"),
    "es": ("{d} de {M} de {y}", "{d} de {M} del {y}", "{d} {M} {y}", "{d}/{S}/{y}", "{d}-{S}-{yy}"),
    "it": ("{d} {M} {y}", "{first} {M} {y}", "{d} {S} {y}", "{d} {M} '{yy}"),
}
# Formats of birth dates without a day.
VAGUE_DATES = ("{M}/{yy}", "{M} {y}", "{S}/{yy}", "{S} {y}")
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
        "(%##) ###-####|%##-###-####|+1 %## ### ####|+1-%##-###-####|%##.###.####|020 7### ####|07### ######|"
        "+44 7### ######|+44 (0)20 7### ####|+91 9#### #####|0%### ######|%##-###-####x%###|1 (%##) ###-####"
    ).split("|"),
    "de": (
        "0%## #######|+49 1%# #######|0%##/######|(0%###) ######|+49 (0) %## ######|01%#-#######|"
        "0043 %## ######|+43 6%# ### ####|030 ########|0170########|0%## - ## ## ##"
    ).split("|"),
    "nl": (
        "06-########|06 ## ## ## ##|+31 6 ########|0%#-#######|(0%#) ### ## ##|0031 6########|"
        "+32 4%# ## ## ##|04%#/##.##.##|+31(0)%# ### ####"
    ).split("|"),
    "fr": (
        "0% ## ## ## ##|0%########|+33 % ## ## ## ##|0%.##.##.##.##|+33 (0)% ## ## ## ##|06-##-##-##-##|"
        "+41 %# ### ## ##|0033 % ########|0%## ## ## ##"
    ).split("|"),
    "es": (
        "6## ### ###|9%# ## ## ##|+34 6## ## ## ##|+34 9########|(+34) 9%# ### ###|6##-###-###|"
        "0034 6## ### ###|+52 55 #### ####|55-####-####|6########"
    ).split("|"),
    "it": (
        "3%# #######|+39 3%# ### ####|0%-########|0%# ######|+39 0%# #######|333.#######|0039 3%#######|"
        "3%#/#######|(0%#) #######"
    ).split("|"),
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
    "########|%#########|%###########|###-######-#|%#.###.###|##-##-## ########|?-%####|%##-#######-##|"
    "KD%#####"
).split("|")
CARDS = (
    "4### #### #### ####|5%## #### #### ####|6011 #### #### ####|4###############|5%##############|"
    "37## ###### #####|34#############|4###-####-####-####|5%##-####-####-####|3%## ###### ####|"
    "%###############|4###.####.####.####"
).split("|")
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
    "#########|%#######|########?|??#######|?? ######|####-####|^^^^^^^^^|??-######|###.###.###|?###########|"
    "####/##/####"
).split("|")
CODES = (
    "#%####|INV-20##-0###|?? ####|?-%###|PO%#####|%####/##|RE-%####|??###|T-%#####|???-%###|No. %####|#%###-?"
).split("|")
BUILDINGS = "%|%|%#|%#|%#|%##|%###|%#?|%#*|%*|%# ?|%-%|%#-%#|%/%|%#/?".split("|")
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
# Cities of the languages for which Faker makes its cities up.
CITIES = {
    "en": "London,Leeds,Bristol,York,Cardiff,Belfast,Dublin,Boston,Chicago,Denver,Seattle,Austin,New York,"
    "Los Angeles,Toronto,Sydney,Perth,Portland,Glasgow,Oxford,Newcastle upon Tyne,San Diego,Salt Lake City,"
    "Plymouth,Bath,Houston,Phoenix,Mumbai,Nairobi,Stratford-upon-Avon",
    "fr": "Paris,Lyon,Marseille,Lille,Nantes,Rennes,Dijon,Toulouse,Bordeaux,Nice,Grenoble,Angers,Le Havre,"
    "Saint-Étienne,La Rochelle,Genève,Lausanne,Bruxelles,Namur,Aix-en-Provence,Le Mans,Brest,Tours,Metz,"
    "Avignon,Clermont-Ferrand,Pau,Annecy,Fribourg,Montréal",
    "es": "Madrid,Barcelona,Sevilla,Bilbao,Zaragoza,Granada,Málaga,Vigo,Las Palmas,Palma,San Sebastián,"
    "Ciudad de México,Guadalajara,Puebla,Bogotá,Lima,Buenos Aires,Rosario,Montevideo,Quito,"
    "Alcalá de Henares,Gijón,Cádiz,Mérida,Burgos,Lugo,Elche,Tijuana,Sabadell,Santa Cruz de Tenerife",
}
STREETS = {
    "en": "{} Street|{} Road|{} Lane|{} Ave|{} St|{} Close|{} Drive|Old {} Road|{} Blvd.|{} Court".split("|"),
    "de": "{}straße|{}str.|{}weg|{}gasse|Am {}|{}allee|{}-Straße|{} Platz|An der {}|{}ring".split("|"),
    "nl": "{}straat|{}laan|{}weg|{}plein|{}kade|Laan van {}|{}dijk|{}hof|Burg. {}straat".split("|"),
    "fr": (
        "rue {}|rue de {}|avenue {}|bd {}|impasse {}|place {}|chemin de {}|allée {}|Rue du {}|quai {}"
    ).split("|"),
    "es": (
        "Calle {}|Calle de {}|C/ {}|Avenida {}|Avda. de {}|Plaza {}|Paseo de {}|Camino de {}|calle {}"
    ).split("|"),
    "it": "Via {}|Via {}|via {}|Viale {}|Corso {}|Piazza {}|Vicolo {}|Largo {}|V.le {}".split("|"),
}
MAIL_DOMAINS = (
    "gmail.com yahoo.com outlook.com hotmail.com aol.com proton.me icloud.com tutanota.com"
).split()
DOMAIN_ENDS = {
    "en": "com co.uk org net us io",
    "de": "de at com ch",
    "nl": "nl be eu com",
    "fr": "fr ch com org",
    "es": "es com mx cat",
    "it": "it com eu net",
}
WORDS = (
    "sun tiger coffee river moon pixel rocket maple wolf ninja blue shadow happy lucky green storm silver "
    "panda turbo music"
).split()
ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s st t tr v w z sch".split()
NUCLEI = "a e i o u a e i o ai ea ie ou au".split()
CODAS = ["", "", "", "l", "n", "r", "s", "m", "nd", "rt", "st", "ck"]


def side_of(slot: str, value: str) -> str:
    """Returns the side of a value by a hash, without case and accents; of a name, the last word is hashed."""
    plain = unicodedata.normalize("NFKD", value.casefold()).encode("ascii", "ignore").decode()
    if slot in ("GIVENNAME", "SURNAME"):
        plain = plain.replace("-", " ").replace("'", " ").split()[-1:]
    return "held" if zlib.crc32("".join(plain).encode()) % 4 == 0 else "train"


def load_fakers(seed: int) -> dict:
    """Returns {locale: seeded Faker}; raises ImportError with the remedy if Faker is not installed."""
    try:
        from faker import Faker
    except ImportError as error:
        raise ImportError("make_pairs needs Faker for names and addresses: pip install -e .[data]") from error
    fakers = {}
    for number, locale in enumerate(sum(LOCALES.values(), ())):
        fakers[locale] = Faker(locale, use_weighting=False)
        fakers[locale].seed_instance(seed * 1000 + number)
        for provider in fakers[locale].get_providers():
            if locale == "it_IT" and hasattr(provider, "cities"):
                # Faker makes this list from a set, whose order differs between processes.
                provider.cities = sorted(provider.cities)
    return fakers


def fill_pattern(rng: random.Random, pattern: str) -> str:
    """Replaces the signs of a pattern (see the top of this file) by random characters."""
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
    """Draws values of one language and side; `draw` knows every slot of the clauses."""

    def __init__(self, language: str, side: str, rng: random.Random, fakers: dict):
        self.language, self.side, self.rng, self.fakers = language, side, rng, fakers
        # Given names and surnames of the current text, for its addresses and user names.
        self.names: list[str] = []

    def draw(self, slot: str) -> str:
        """Returns a value for a slot such as GIVENNAME or price; raises KeyError for an unknown slot."""
        if slot in SPLIT_CLASSES:
            value = self._of_side(slot, getattr(self, f"_{slot.lower()}"))
            if slot in ("GIVENNAME", "SURNAME"):
                self.names.append(value)
            return value
        tables = {"TELEPHONENUM": PHONES, "ZIPCODE": ZIPCODES, "PRICE": PRICES, "PERCENT": PERCENTS}
        identities = {"IDCARDNUM": IDCARDS, "SOCIALNUM": SOCIALS, "TAXNUM": TAXES}
        identities["DRIVERLICENSENUM"] = LICENSES
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
        if "-" in ending:
            return stem.capitalize() + joint + ending
        return (stem + joint + ending).capitalize()

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
        half = "pm" if hour > 11 else "am"
        styles += {
            "en": [f"{twelve}:{minute:02} {half}", f"{twelve}{half}"],
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
        """Returns two words for an address: the names of this text if it has any, else new ones."""
        names = [_plain(name) for name in self.names] if self.rng.random() < 0.65 else []
        names = [name for name in names if name]
        while len(names) < 2:
            name = self._of_side("SURNAME", self._one_surname) if names else self._givenname()
            names.append(_plain(name) or "x")
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
        if rng.random() < 0.4:
            domain = rng.choice(MAIL_DOMAINS)
        else:
            domain = f"{own}.{rng.choice(DOMAIN_ENDS[self.language].split())}"
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
        words = [rng.choice(WORDS), *(_plain(self._invented(ends)) for ends in (SURNAME_ENDS, CITY_ENDS))]
        word = rng.choice(words)
        letters = string.ascii_letters + string.digits + signs
        noise = "".join(rng.choice(letters) for _ in range(rng.randint(7, 13)))
        noise += rng.choice(string.ascii_letters)
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
    """Returns a name as in an address: its last word in lower-case ASCII letters."""
    words = unicodedata.normalize("NFKD", name.casefold().replace("ı", "i").replace("ł", "l"))
    words = words.encode("ascii", "ignore").decode()
    return "".join(c for c in words.split()[-1] if c.isalnum()) if words.split() else ""
