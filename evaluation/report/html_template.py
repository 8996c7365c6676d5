"""The HTML report's template (Jinja2, autoescaped): one self-contained page that loads nothing from elsewhere."""

TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for piece in content -%}
{%- if piece.bold -%}<b>{{ piece.text }}</b>{%- else -%}{{ piece.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}

{%- macro marked(report) -%}
{%- for span in report.spans -%}
{%- if span.verdict -%}<span class="{{ span.verdict }}">{{ span.text }}</span>{%- else -%}{{ span.text }}{%- endif -%}
{%- else -%}<i>empty</i>
{%- endfor -%}
{%- if report.missed -%}<p class="note">Not mentioned: {{ report.missed | join(", ") }}.</p>{%- endif -%}
{%- endmacro -%}

{%- macro block(content) -%}
{%- if content.kind == "heading" -%}
<h{{ content.level }}>{{ text(content.text) }}</h{{ content.level }}>
{%- elif content.kind == "paragraph" -%}
<p{% if content.is_note %} class="note"{% endif %}>{{ text(content.text) }}</p>
{%- elif content.kind == "bullets" -%}
<ul>{% for item in content.items %}<li>{{ text(item) }}</li>{% endfor %}</ul>
{%- elif content.kind == "table" -%}
<table><tr>{% for cell in content.header %}<th>{{ text(cell) }}</th>{% endfor %}</tr>
{%- for row in content.rows %}<tr>{% for cell in row %}<td>{{ text(cell) }}</td>{% endfor %}</tr>{% endfor -%}
</table>
{%- elif content.kind == "image" -%}
<img alt="{{ content.alt }}" src="data:image/png;base64,{{ content.base64 }}">
{%- elif content.kind == "legend" -%}
<p class="note"><span class="agrees">agrees with the reference</span> \
<span class="contradicts">contradicts it, or its side</span> \
<span class="unsupported">is not in it</span>. \
Only statements about the 18 findings are marked; the rule-based labeller that reads them makes errors too.</p>
{%- elif content.kind == "reports" -%}
<table class="texts"><tr><td>reference</td><td>{{ content.reference }}</td></tr>
{%- for name, report in content.reports %}<tr><td>{{ name }}</td><td>{{ marked(report) }}</td></tr>{% endfor -%}
</table>
{%- endif -%}
{%- endmacro -%}

{%- macro blocks(contents) -%}
{%- for content in contents -%}{{ block(content) }}
{% endfor -%}
{%- endmacro -%}

<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border: 1px solid #ccc; padding: .25rem .5rem; }
th { background: #f2f2f2; text-align: left; } td { text-align: right; vertical-align: top; }
td:first-child, .texts td { text-align: left; } img { max-width: 100%; } .note { color: #666; }
.agrees { background: #d6f0d8; } .contradicts { background: #f9c9c4; color: #8b0000; } .unsupported { background: #ffe8b3; }
section { margin: 2rem 0; } pre { white-space: pre-wrap; }
</style></head><body><h1>{{ title }}</h1>
<p><b>For research only, not for diagnosis.</b></p>
{% for section in sections if section.blocks -%}
<section><h2>{{ section.heading }}</h2>
{{ blocks(section.blocks) -}}
</section>
{% endfor -%}
</body></html>
"""
