"""A process of its own that renders chat templates: whatever a template does, it has little memory and can be killed.

Reads lines of JSON {"template", "values"}, answers lines {"text"} or {"error"}. Imports nothing of polybit.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY = 512 << 20  # bytes of address space
MOST_TEXT = 16 << 20  # characters of a rendered chat


def main() -> None:
    """Render until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks for training what the model wrote; read here as if it were not there."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    # what transformers gives to templates
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled: dict[str, Any] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            template = compiled.get(asked["template"])
            if template is None:
                compiled.clear()
                template = compiled[asked["template"]] = environment.from_string(asked["template"])
            answer = {"text": written(template, asked["values"])}
        except MemoryError:
            answer = {"error": "it needs more memory than a template may have"}
        except Exception as error:  # whatever a template does is an error of the template
            answer = {"error": f"{str(error) or type(error).__name__:.300}"[:300]}
        print(json.dumps(answer), flush=True)


def written(template: Any, values: Any) -> str:
    """The rendered text, given up once it is too long."""
    parts, size = [], 0
    for part in template.generate(**values):
        size += len(part)
        if size > MOST_TEXT:
            raise ValueError(f"it writes more than {MOST_TEXT} characters")
        parts.append(part)
    return "".join(parts)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """transformers' filter: plain JSON, without Jinja's escaping of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


if __name__ == "__main__":
    main()
