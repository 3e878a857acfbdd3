"""What hypothesis draws: XML texts, elements, cuts of bytes."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from hypothesis import strategies as st

from syncd.xmpp.xml import NS_CLIENT, NS_XML

# XML 1.0 section 2.2: the characters that it can carry.
xml_texts = st.text(
    st.characters(
        exclude_categories=["Cs"],
        exclude_characters=[
            *(chr(code) for code in range(0x20) if chr(code) not in "\t\n\r"),
            "\ufffe",
            "\uffff",
        ],
    ),
    max_size=12,
)

cuts = st.lists(st.integers(1, 40), max_size=60)
"""Sizes of successive reads; what remains comes in one."""

_namespaces = st.sampled_from(
    ["", NS_CLIENT, "urn:a", "urn:b&c", "http://x.example/'q'#<>", "urn:\u00e4\u5b57"]
)
_names = st.sampled_from(["a", "iq", "xmlns-like", "\u00e9l\u00e9ment", "a0", "x.y_z"])


@st.composite
def _tags(draw: st.DrawFn) -> str:
    namespace, name = draw(_namespaces), draw(_names)
    return f"{{{namespace}}}{name}" if namespace else name


_attributes = st.dictionaries(
    st.one_of(_tags(), st.just(f"{{{NS_XML}}}lang")), xml_texts, max_size=4
)


@st.composite
def elements(draw: st.DrawFn, depth: int = 3) -> Element:
    """Elements with mixed content, up to `depth` levels."""
    element = Element(draw(_tags()), draw(_attributes))
    element.text = draw(xml_texts)
    if depth > 1:
        for child in draw(st.lists(elements(depth - 1), max_size=3)):
            child.tail = draw(xml_texts)
            element.append(child)
    return element
