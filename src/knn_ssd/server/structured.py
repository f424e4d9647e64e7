"""What a request says of the form of its answer: the response format, and the tools that may be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar, json_rule
from knn_ssd.server.messages import Strict
from knn_ssd.server.thinking import Thinking, formed

MOST_TOOLS = 128
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FieldError(UsageError):
    """A field of a request that cannot be used.

    Args:
        field: its place in the request's body.
        error: what is wrong with it.
    """

    def __init__(self, field: str, error: UsageError) -> None:
        super().__init__(f"{field}: {error.message}", error.hint)
        self.field = field


class NamedSchema(BaseModel):
    """A JSON schema with its name. It is enforced whether or not `strict` asks for it."""

    model_config = ConfigDict(extra="forbid")

    name: _Name
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that is valid by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionDefinition(Strict):
    """A function that may be called: its name, what it does, and the JSON schema of its arguments."""

    name: _Name
    description: str = ""
    parameters: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object", "properties": {}, "additionalProperties": False}
    )
    strict: bool = False


class Tool(Strict):
    """A tool that may be called."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Any = None

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = self.function
        described = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": described}


class FunctionName(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def format_grammar(
    form: TextFormat | JsonObjectFormat | JsonSchemaFormat, thinking: Thinking | None = None
) -> Grammar | None:
    """The grammar of a response format, after the thinking if there may be any; None for free text.

    Raises:
        FieldError: the schema cannot be used.
    """
    if isinstance(form, TextFormat):
        return None
    schema = {"type": "object"} if isinstance(form, JsonObjectFormat) else form.json_schema.json_schema
    try:
        grammar = Grammar.json_schema(schema)
        return grammar if thinking is None else formed([f"form: {json_rule(schema)}"], thinking)
    except UsageError as error:
        raise FieldError("response_format.json_schema.schema", error) from error


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raises a validation error for tools of one name, and for a choice among tools that are not there."""
    names = [tool.function.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PydanticCustomError("twice", "tools must have different names, got '{name}' twice", {"name": twice})
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        name = choice.function.name
        raise PydanticCustomError("unknown_tool", "tool_choice names '{name}', which is not in tools", {"name": name})
    if choice == "required" and not tools:
        raise PydanticCustomError("no_tools", "tool_choice 'required' needs tools")
