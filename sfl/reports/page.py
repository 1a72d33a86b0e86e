"""The page of a report: one HTML file that needs nothing else.

Texts from runs' files are escaped by Jinja, and figures are images, in which nothing is executed.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2
import pandas as pd

from sfl import __version__
from sfl.reports.figures import Picture


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a line of explanation, tables and figures."""

    title: str
    about: str = ""
    tables: Sequence[pd.DataFrame] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    folded: dict[str, pd.DataFrame] = field(default_factory=dict)  # by their heading


_PAGE = """\
{%- macro show(table) %}
<div class="wide"><table>
<thead><tr>
{%- for name in table.columns %}<th>
{%- for part in name.split("_") %}{{ part }}{% if not loop.last %}_<wbr>{% endif %}{% endfor -%}
</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for row in table.itertuples(index=False, name=None) %}
<tr>
{%- for cell in row %}<td{% if cell|length < 26 %} class="short"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff;
  max-width: 1160px; margin: 0 auto; padding: 12px 16px 40px; }
h1 { font-size: 1.5em; margin: .4em 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 1.8em 0 .3em; border-bottom: 1px solid #999; }
p { margin: .4em 0; overflow-wrap: anywhere; }
.note { border-left: 3px solid #777; padding-left: .6em; color: #333; }
.wide { overflow-x: auto; margin: .6em 0; }
table { border-collapse: collapse; border-top: 2px solid #111; border-bottom: 2px solid #111;
  font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; border-bottom: 1px solid #111; }
th, td { padding: 3px 12px 3px 2px; vertical-align: top; max-width: 26em; min-width: 3.5em;
  overflow-wrap: break-word; }
td.short { white-space: nowrap; }
td:not(.short) { min-width: 14em; }
td:first-child { min-width: 9em; }
tbody tr:nth-child(even) { background: #f3f3f3; }
.figures { display: grid; gap: 14px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; max-width: 560px; height: auto; }
figcaption { font-size: 13px; color: #333; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .5em 0; }
@media print {
  body { max-width: none; font-size: 12px; }
  .figures { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
  table { font-size: 10px; }
  th, td, td:first-child, td.short, td:not(.short) {
    min-width: 0; padding-right: 6px; white-space: normal; }
  td:not(.short) { overflow-wrap: anywhere; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
{%- for section in sections %}
<h2>{{ section.title }}</h2>
{%- if section.about %}
<p>{{ section.about }}</p>
{%- endif %}
{%- for note in section.notes %}
<p class="note">{{ note }}</p>
{%- endfor %}
{%- for table in section.tables %}{{ show(table) }}{% endfor %}
{%- if section.pictures %}
<div class="figures">
{%- for picture in section.pictures %}
<figure><img alt="{{ picture.caption }}" src="{{ picture|data_address }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{%- endfor %}
</div>
{%- endif %}
{%- for heading, table in section.folded.items() %}
<details><summary>{{ heading }}</summary>{{ show(table) }}</details>
{%- endfor %}
{%- endfor %}
</body>
</html>
"""


def _data_address(picture: Picture) -> str:
    """Return a figure as an address that holds the whole image."""
    data = io.BytesIO()
    picture.figure.savefig(data, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()


def render(title: str, about: str, sections: Sequence[Section]) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_address"] = _data_address
    told = f"{about} Written by SFL {__version__}."
    return environment.from_string(_PAGE).render(title=title, about=told, sections=sections)
