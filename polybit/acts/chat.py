"""Talk with a model for several turns, at a width that may change in mid-conversation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from polybit.acts.generate import choose_arithmetic
from polybit.acts.streaming import Heard, Say
from polybit.compress.sizes import default_presets, preset_sizes, warn_of_width
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.data.chat import encode_prompt
from polybit.data.files import mend
from polybit.data.turns import Messages
from polybit.hub.decode import generate as write
from polybit.hub.lm import longest_input
from polybit.hub.models import open_model
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import use
from polybit.options.chat import ChatOptions
from polybit.options.checks import plain
from polybit.report.tables import size

HELP = """/width w3    go on at another width (as in w4 or w4a8), and see what that changes; alone: which there are
/again       answer the last message again, at the width of now
/new         forget the conversation
/quit        leave (or the end of the input)
"""


def chat(model: str, options: ChatOptions, lines: Iterable[str] | None = None, say: Say = lambda _: None) -> Run:
    """Talk with MODEL (a polybit directory, any Hugging Face id or path, or tinychat).

    lines: what the user says, in place of the option; say: called with every piece of what is to be shown.
    """
    run = Run("chat", {"model": model, **plain(options)})
    torch.manual_seed(options.seed)
    with run.timed():
        loaded, tokenizer = open_model(model, trust_remote_code=options.trust_remote_code)
        talk = ChatTalk(loaded, tokenizer, options, say)
        for line in (options.line or ()) if lines is None else lines:
            if not talk.take(str(mend(line)).strip()):
                break
    run.numbers = {"turns": talk.turns}
    return run


class ChatTalk:
    """One conversation: what was said, and the width of now."""

    def __init__(self, model: Any, tokenizer: Any, options: ChatOptions, say: Say) -> None:
        self.model, self.tokenizer, self.options, self.say = model, tokenizer, options, say
        self.quantized = any(isinstance(module, QuantWeight) for module in model.modules())
        self.width = next(iter(default_presets(model)), "all bits") if self.quantized else "float"
        self.turns: list[dict[str, Any]] = []
        self.messages: Messages = []
        self.answered: tuple[list[int], list[int]] | None = None  # tokens of the last prompt and of its answer
        self.forget()
        if options.precision is not None:
            self.switch(options.precision)
        elif self.quantized:
            choose_arithmetic(model, options.arithmetic)

    def forget(self) -> None:
        """Begin a conversation."""
        self.messages = [{"role": "system", "content": self.options.system}] if self.options.system else []
        self.answered = None

    def take(self, line: str) -> bool:
        """One line of the user; False when it ends the talk. What cannot be done is said, and the talk goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit", "/bye"):
            return False
        try:
            if word in ("/width", "/precision"):
                self.change(rest.strip())
            elif word == "/new":
                self.forget()
                self.say("A new conversation.\n")
            elif word == "/again":
                self.again()
            elif word == "/help":
                self.say(HELP)
            elif word.startswith("/"):
                raise PolybitError(f"{word!r:.40} is no command: choose /width, /again, /new, /quit or /help")
            elif line:
                self.messages.append({"role": "user", "content": line})
                self.answer()
        except PolybitError as error:
            self.say(f"{error}\n")
        return True

    def again(self) -> None:
        """Answer the last message anew."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise PolybitError("nothing was answered yet: say something first")
        self.messages.pop()
        self.answer()

    def answer(self) -> None:
        """Write the answer to what was said last; Ctrl-C ends the answer, not the talk."""
        ids = self.prompt()
        heard = Heard(self.tokenizer, ids, self.say)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.options.temperature:
            sampling = {"do_sample": True, "temperature": self.options.temperature}
        end = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        room = longest_input(self.model) or 1 << 30
        ids_1T, started = torch.tensor([ids]), time.perf_counter()
        try:
            with torch.inference_mode():
                write(
                    self.model,
                    ids_1T,
                    attention_mask=torch.ones_like(ids_1T),
                    max_new_tokens=min(self.options.max_tokens, room - len(ids)),
                    pad_token_id=end,
                    streamer=heard,
                    **sampling,
                )
        except KeyboardInterrupt:
            self.say(" ...")
        self.say("\n")
        seconds = time.perf_counter() - started
        self.answered = ids, heard.tokens
        text = self.tokenizer.decode(heard.tokens, skip_special_tokens=True).strip()
        self.turns.append(
            {
                "said": self.messages[-1]["content"],
                "answer": text,
                "precision": self.width,
                "new_tokens": len(heard.tokens),
                "tokens_per_second": len(heard.tokens) / seconds,
            }
        )
        self.messages.append({"role": "assistant", "content": text})

    def prompt(self) -> list[int]:
        """The tokens of the conversation; the oldest turns are dropped where it has become too long, and said so."""
        room, dropped = longest_input(self.model), 0
        while True:
            ids = encode_prompt(self.tokenizer, self.messages)
            if room is None or len(ids) < room:
                break
            first = int(self.messages[0]["role"] == "system")
            if len(self.messages) <= first + 1:
                del self.messages[-1]
                raise PolybitError(f"this has {len(ids)} tokens and the model reads at most {room}: say it shorter")
            del self.messages[first : first + 2]
            dropped += 1
        if dropped:
            self.say(f"(the oldest {dropped} of the turns no longer fit the model's {room} tokens)\n")
        return ids

    def switch(self, precision: str) -> None:
        """Read the weights at another width from now on."""
        use(self.model, precision)
        warn_of_width(self.model, precision)
        self.width = f"w{precision}" if precision.isdecimal() else precision
        if self.quantized:
            choose_arithmetic(self.model, self.options.arithmetic)

    def change(self, precision: str) -> None:
        """`/width`: which widths there are, or another one and what is different with it."""
        if not self.quantized:
            raise PolybitError("a float model has one width: make it a checkpoint of many with polybit quantize")
        if not precision:
            self.say(f"{self.width} now; there are {', '.join(default_presets(self.model))}.\n")
            return
        before = self.width
        self.switch(precision)
        if before == "all bits":
            self.say(f"{precision} from now on.\n")
            return
        sizes = preset_sizes(self.model, [before, self.width])
        self.say(f"{self.width}: {described_size(sizes[self.width])}; {before}: {described_size(sizes[before])}.\n")
        if self.answered is not None and self.answered[1] and self.width != before:
            self.say(self.differences(*self.answered) + "\n")

    @torch.inference_mode()
    def differences(self, prompt: list[int], answer: list[int]) -> str:
        """What the width of now would have written otherwise in the last answer, word for word after the same words."""
        logits_TV = self.model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        own = logits_TV.argmax(-1).tolist()
        places = [at for at, (mine, theirs) in enumerate(zip(own, answer, strict=True)) if mine != theirs]
        if not places:
            return f"All {len(answer)} tokens of the last answer would be the same."
        at = places[0]
        before, was, now = (self.tokenizer.decode(ids) for ids in (answer[:at][-8:], [answer[at]], [own[at]]))
        where = f"after {before!r}" if before else "at its beginning"
        return (
            f"{len(places)} of {len(answer)} tokens of the last answer would be others, the first {where}: "
            f"{now!r}, not {was!r}. /again answers anew."
        )


def described_size(row: dict[str, float]) -> str:
    """Bits and bytes of the quantized weights."""
    return f"{row['bits_per_weight']:.2f} bits per weight, {size(row['bytes'])} read per token"
