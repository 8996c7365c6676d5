"""Expressions for CT-RATE's 18 findings in English chest-CT reports, as regular expressions on one lower-case clause."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """An expression for a finding, matched in one lower-case clause.

    Attributes:
        head: regular expression of the finding itself; cues before and after its match decide about negation. A group
            `head` narrows the match; where a group `other` matches, the expression means something else.
        near: must also match somewhere in the clause ("" = no condition).
        unless: must match nowhere in the clause ("" = no condition).
        despite: overrides `unless` where it matches in the phrase of the head and `unless` doesn't match there.
        is_measure: the head is a measure or an organ that may be normal (heart size, lymph nodes), not a pathology:
            "not enlarged" and "no increase in" deny it.
    """

    head: str
    near: str = ""
    unless: str = ""
    despite: str = ""
    is_measure: bool = False


_CALCIFICATION = (
    r"(?:calcif\w*\b(?! (?:\w+ )?(?:lymph|nod|granulom|pleura|thyroid))|calcium|athero\w*"
    r"|(?<!pleural )plaques?\b(?!-like))"
)
_AORTA = r"aort(?!o-?pulm|ico-?pulm)\w*"  # not the aortopulmonary window, a lymph node station
_ARTERY = rf"{_AORTA}|arter\w*|vascular|vessel\w*|supra-?aortic"
_CORONARY = r"coronar(?:y|ies)|\b(?:lad|rca|lcx|lmca)\b|circumflex|left anterior descending|left main"
_NOT_LUNG = (
    r"thyroid|adrenal|liver|hepat|spleen|splenic|kidney|renal|breast|subcutan|pancrea|periton|omental|mesenter"
    r"|gallbladder|bone|vertebra|goit|isthmus|axilla|skin|lymph(?:atic)? nodul"
)
_NOT_CHEST = (
    r"abdom|pelvi|perihepat|perisplen|perirenal|perinephr|periton|bowel|intestin|gallbladder|\bliver|hepat|spleen|renal"
    r"|morrison|bursa|\bjoint|sinus(?:es)?\b|\bknee|shoulder|\bhip\b|subdural|scrot"
)
_LUNG = r"\blungs?\b|pulmonary|(?:upper|lower|middle) lobe|lingul|parenchym"
_THICK = (
    r"thicken\w*|thickness(?:es)?[- ]increas\w*|thickness(?:es)? (?:is|are|was|were|has|have) increased"
    r"|increase\w* (?:in|of) [a-z ]{0,40}?thickness"
)
_LARGE = r"(?:enlarg\w+|increas\w+|larger?(?! vess)|greater|above normal|dilated|big(?:ger)?|widened)"

TERMS: dict[str, tuple[Term, ...]] = {
    "Medical material": (
        Term(
            r"\b(?:catheter\w*|stents?|stented|stenting|pacemaker\w*|pace(?:r|rs|r? wires?)|port|port-?a-?cath"
            r"|mediport"
            r"|chemoport|portacath|prosthe\w+|sternotomy|clips?|sutures?|staples?|staple line|cannula\w*|tubes?|picc"
            r"|valvuloplasty|cerclage|osteosynthes\w+|icd|electrodes?|screws?|drains?|pigtail|hickman|permcath"
            r"|surg\w+ materials?|metal\w*(?: \w+)? (?:materials?|density|densities|clips?|artifacts?|sutures?"
            r"|hardware)"
            r"|(?:breast|silicone|cochlear|orthopa?edic|metal\w*) implants?|defibrillator\w*|(?:aortic|vascular"
            r"|bypass|endovascular) grafts?|stent-?grafts?"
            r"|(?:sternal|cerclage|metal\w*|wire) (?:wires?|sutures?)|(?:ivc|vena cava\w*) filters?"
            r"|vertebroplasty|cement"
            r"|(?:fixation|orthopa?edic|surgical|spinal) (?:hardware|rods?|plates?)|hardware|embolization coils?"
            r"|(?:vp|ventriculo\w+) shunt|(?:tavi|tavr)\b|loop recorder|balloon pump|ecmo|(?:mechanical"
            r"|bioprosthetic) valves?"
            r"|valve (?:replacement|prosthe\w+)|tracheostomy|(?:cardiac|pacing|pacemaker|ventricular|icd|dual) leads?"
            r"|leads? in the (?:right|heart)"
            r"|(?:central|venous|arterial|femoral|jugular|subclavian|picc|hickman|support) lines?"
            r"|lines? (?:and|or) (?:tubes?|drains?)|support devices?)\b"
        ),
    ),
    "Arterial wall calcification": (
        Term(_CALCIFICATION, near=_ARTERY, unless=_CORONARY),
        Term(
            _CALCIFICATION,
            near=rf"{_AORTA}|vascular(?!:)|supra-?aortic|carotid|iliac|subclavian",
        ),
        Term(r"atherosclerosis|atherosclerotic (?:changes|calcif\w*)", unless=_CORONARY),
    ),
    "Cardiomegaly": (
        Term(r"cardiomegaly"),
        Term(r"\b(?:enlarged|dilated|large) (?:heart|cardiac|cardiothoracic)", is_measure=True),
        Term(
            r"\b(?:enlarge|increase)\w* (?:(?:of|in) )?(?:the )?(?:size |sizes |dimensions? )?(?:of )?(?:the )?"
            r"(?:heart|cardiac|cardiothoracic)",
            is_measure=True,
        ),
        Term(
            r"\b(?:heart|cardiac|cardiothoracic|ct ratio|ctr)\b[^;]{0,80}?"
            r"\b(?:size|dimension|ratio|index|diameter|volume|width|ctr)s?\b[^;]{0,60}?"
            r"(?P<head>increas\w*|enlarg\w+|larger?\b|greater|above normal)",
            is_measure=True,
        ),
        Term(
            r"\b(?:heart|silhouette|contours?)(?: size)? ?(?:is|are|was|were|appears?|seems?|remains?|:|-)"
            rf" (?:(?!not\b|normal|limits)[\w-]+ ){{0,3}}?(?:not )?(?:\w+ )?(?P<head>{_LARGE})",
            near=r"heart|cardiac",
            is_measure=True,
        ),
        Term(r"\bcardiac (?:enlargement|dilatation|dilation)", is_measure=True),
        Term(r"\bctr (?:is |was )?(?P<head>increas\w*|above)", is_measure=True),
    ),
    "Pericardial effusion": (
        Term(r"pericardial[- ](?:[\w-]+[- ]){0,3}?(?:effusion|fluid|collection)\w*"),
        Term(r"(?<!pleural )(?:effusion|fluid)\w* (?:\w+ ){0,4}(?:pericardi\w+|around the heart)"),
        Term(
            r"(?<!pleural )(?P<head>effusion|fluid)\b[\w ]{0,45}?\bpericardi(?:um|al (?:area|space|sac|cavity"
            r"|region))"
        ),
        Term(r"(?:pleural|pleuro)\w*(?:,| and| or|-)? ?(?:and |or )?pericardial (?:effusion|fluid)"),
        Term(r"pericardium\b[^;]{0,40}?(?<!pleural )(?P<head>effusion\w*|fluid)"),
        Term(r"(?P<head>pericardial)(?: and| or|-|/) ?(?:[\w-]+ ){0,3}?pleural (?:effusion|fluid)|ha?emopericardium"),
    ),
    "Coronary artery wall calcification": (Term(_CALCIFICATION, near=_CORONARY),),
    "Hiatal hernia": (
        Term(
            r"hiat\w+ herni\w*|herni\w* hiat\w*|(?:diaphragmatic )?hiatus hernia|hiatal sliding hernia"
            r"|(?:sliding|para-?o?esophageal)(?: type)?(?: gastric)? hernia|herni\w+ (?:\w+ ){0,6}hiatus"
        ),
    ),
    "Lymphadenopathy": (
        Term(r"(?:lymph)?adenopath\w*|lymphadenomegal\w*|\blaps?\b|lymph node enlargement|nodal enlargement"),
        Term(
            r"(?<!intrapulmonary )(?<!intra-pulmonary )lymph[- ]?nodes?|lymphadeni\w*",
            unless=r"\b(?:evaluation|assessment) of",
            is_measure=True,
        ),
        Term(
            r"\b(?:enlarged|hilar|mediastinal|axillary|paratracheal|subcarinal|supraclavicular|prevascular"
            r"|necrotic|pathological"
            r"|prominent) (?:[a-z]+ ){0,3}?(?P<head>nodes)\b",
            unless=r"\b(?:evaluation|assessment) of",
            is_measure=True,
        ),
    ),
    "Emphysema": (
        Term(
            r"(?P<other>(?:subcutaneous|surgical|mediastinal|soft tissue|interstitial|skin|chest wall)(?: \w+)? )?"
            r"(?:emphysem\w*\b|\bbullae?\b|\bbullous|\bblebs?\b)"
            r"(?! (?:(?:is|are|was|seen|noted|observed|present|in|of|within|under|along|over|at|involving|the"
            r"|right|left|both|bilateral"
            r"|anterior|lateral|posterior) ){0,7}(?:skin|subcutan|soft tissue|chest wall|muscle|neck|axilla"
            r"|mediastin))"
        ),
    ),
    "Atelectasis": (
        Term(r"(?<!fibro)(?<!fibro-)atelecta\w*"),
        Term(
            r"\bcollaps\w*",
            unless=r"vertebr|fracture|stomach|bladder|o?esophag|cava|corpus|corpuscles|spin(?:e|al)|trache|colon|bowel"
            r"|\bt\d|\bl\d|lumbar|thoracic|gastric|bronch(?!ogram)",
        ),
    ),
    "Lung nodule": (
        Term(
            r"(?:micro|pseudo)?nodul(?:e|es|ar lesions?|ar formations?|ar density|ar densities|ar opacit\w+)\b",
            unless=_NOT_LUNG,
            despite=_LUNG,
        ),
    ),
    "Lung opacity": (
        Term(
            r"ground[- ]?glass(?! nodul)|(?<!contrast )opacit\w+|(?<!contrast )opacifi\w+\b(?! with contrast)"
            r"|crazy[- ]paving"
            r"|(?<!fatty )(?<!fat )infiltrat\w+",
            unless=r"(?:infiltrat\w+|opaci\w+) (?:of|in) (?:the )?(?:liver|fat|muscle|bladder|vessel|sinus)"
            r"|opacif\w+ of the pulmonary arter",
        ),
        Term(
            r"densit(?:y|ies)[- ](?:increa?s?e?m?\w*)|increase\w* (?:in|of) density",
            near=r"lung|lobe|segment|parenchym|lingula|bilateral|pleur",
            unless=r"sequela|fibro|atelecta|subcutaneous|adipose|bone|vertebra",
            is_measure=True,
        ),
    ),
    "Pulmonary fibrotic sequela": (
        Term(
            r"sequela\w*|(?<!myelo)(?<!cystic )fibro(?!aden|gland|id|us dysp|lipom|scan)\w+|\bscar\w*",
            unless=r"surgical|incision|renal|kidney",
        ),
    ),
    "Pleural effusion": (
        Term(r"pleural[- ](?:[\w-]+[- ]){0,3}?(?:effusion|fluid|collection)\w*|pleurisy|h(?:a)?emothorax|hydrothorax"),
        Term(r"hydropneumothorax|(?:fluid|liquid) (?:\w+ ){0,5}(?:pleural|hemithora\w+|fissure)"),
        Term(
            r"(?P<other>pericardial[- ](?:[\w-]+[- ]){0,3}?|(?:joint|knee|shoulder|hip|subdural|peritoneal"
            r"|abdominal|pelvic) (?:\w+ )?)?"
            r"\beffusions?\b(?![\w ,]{0,40}?\b(?:joint|around the heart)|[\w ]{0,40}?\bpericardi(?!\w* (?:effusion|fluid)))",
            unless=rf"pericardi(?:um|al (?:space|cavity|sac))\b[^;]{{0,40}}effusion|{_NOT_CHEST}",
            despite=r"pleura|thora|\blungs?\b|costophren|\b(?:right|left|bilateral)(?:-sided)? (?:\w+ )?effusion",
        ),
        Term(r"effusion\w*", near=r"hemithora\w*|pleura\w*|lung", unless=r"pericardi"),
        Term(r"(?:pleural|pleuro)\w*(?: and| or|-|/) ?(?:an? |\w+ ){0,2}?pericardial (?:effusion|fluid)"),
        Term(r"pericardial(?: and| or|-|/) ?(?:an? |[\w-]+ ){0,3}?(?:pleural|pleuro)\w* (?:effusion|fluid)"),
    ),
    "Mosaic attenuation pattern": (Term(r"mosaic"),),
    "Peribronchial thickening": (
        Term(rf"peri-?bronch\w+ (?:\w+ ){{0,5}}?(?P<head>{_THICK}|cuff\w+)|(?:cuff\w+)(?= of the (?:\w+ )?bronch)"),
        Term(
            rf"(?P<head>{_THICK}) (?:(?:of|in|is|are|was|were|has|been|observed|seen|noted|detected|present|the"
            rf"|both|bilateral|walls?"
            r"|central|segmental|subsegmental|lobar|main|some|lower|lobe) ){0,9}(?:peri-?bronch\w+|bronch\w+)",
            near=r"peri-?bronch|wall",
        ),
        Term(rf"(?:bronch\w+|airways?) walls? ?(?:[\w:,-]+ ){{0,6}}?(?P<head>{_THICK})"),
        Term(rf"(?P<head>{_THICK})(?: of| in)? (?:the )?(?:\w+ )?(?:bronch\w+|airways?) walls?"),
        Term(r"peri-?bronchial cuff\w*|bronchial cuff\w*"),
    ),
    "Consolidation": (Term(r"consolid\w+"),),
    "Bronchiectasis": (
        Term(r"bronchi(?:olo)?[- ]?ecta\w+|ectatic bronch\w+"),
        Term(
            r"bronchi\w* (?:dil(?:a|ata)tion|dilatation|enlargement|widening)\w*"
            r"|(?:dilat\w+|enlargement|ectasia) (?:(?:is|are|was|were) (?:\w+ )?)?(?:of"
            r"|in) (?:the )?(?:\w+ ){0,2}bronchi\w*"
            r"|(?:dilated|ectatic) (?:\w+ ){0,2}bronch\w+",
            is_measure=True,
        ),
        Term(
            r"(?:bronchi|airways) (?:\w+ ){0,6}?(?:(?:is|are|was|were|appears?|look) )(?:\w+ ){0,2}?(?P<head>dilated|ectatic"
            r"|widened)",
            is_measure=True,
        ),
    ),
    "Interlobular septal thickening": (
        Term(rf"sept(?:al|a|um)\b ?(?:[\w:,-]+ ){{0,5}}?(?P<head>{_THICK}|prominen\w+)"),
        Term(rf"(?P<head>{_THICK}) (?:\w+ ){{0,5}}?(?:interlobular|sept(?:al|a|um)\b)"),
        Term(r"\bseptal lines?|kerley"),
    ),
}
