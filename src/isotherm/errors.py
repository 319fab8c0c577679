"""Every error a caller can meet. Each message says what, where and the way out.

IsothermError
├── OptionError            an option, argument or setting is wrong (also a ValueError)
│   ├── MessageError       a message or tool of a chat is wrong; names the field
│   └── GrammarError       a grammar is not valid, or asks for too much
├── ModelNotFound          no model goes by that name
├── DownloadError          a model could not be fetched
├── ModelFileError         a model file is damaged, or is not what it claims to be
│   ├── UnsupportedModel   a sound file that asks for something this version lacks
│   └── ModelFileChanged   the file was changed after it was opened
├── StatsFileError         a file of neuron statistics is damaged, or is none
├── TemplateError          the model's chat template failed, or ran past its limits
├── ContextOverflow        the prompt and the answer do not fit the context
├── InsufficientMemory     the model, with its KV pages, does not fit this machine, or a GPU its share
├── DeviceNotFound         no GPU, or no driver, where one was asked for, or it cannot run our arithmetic
├── DeviceFailed           a GPU or its driver failed: it is lost, or did not compile a kernel
├── ServerError            no server runs where one was asked, or it failed
└── UnsupportedCpu         the instruction set that was asked for is not to be had here

A broken promise of the engine itself is an AssertionError, never one of these.
"""


class IsothermError(Exception):
    """The root: catch this to catch everything a user can cause or mend."""


class OptionError(IsothermError, ValueError):
    """An option, argument, environment variable or config value is wrong."""


class MessageError(OptionError):
    """A message, a tool or the choice of tools is wrong or asks for what is not supported.

    field: where, as in "messages[2].tool_calls[0].function.arguments".
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class GrammarError(OptionError):
    """A grammar is not valid, not supported, allows nothing, or is past a limit; names its kind and the reason."""


class ModelNotFound(IsothermError):
    """No file, alias or repository goes by this name; the message lists what is near."""


class DownloadError(IsothermError):
    """A model could not be fetched: no network, refused, wrong hash or a full disk."""


class ModelFileError(IsothermError):
    """A model file is damaged or is not what it claims; names the file, what was read and what was expected."""


class UnsupportedModel(ModelFileError):
    """The file is sound, but its architecture, tensor type or tokenizer is not supported; lists what is."""


class ModelFileChanged(ModelFileError):
    """The file was replaced, truncated or rewritten after it was opened."""


class StatsFileError(IsothermError):
    """A file of neuron statistics cannot be read, is damaged, or is none."""


class TemplateError(IsothermError):
    """The chat template is not valid, asked for something forbidden, or ran past its limits."""


class ContextOverflow(IsothermError):
    """The request needs more positions than the context has.

    num_tokens: positions the request needs; context_tokens: positions there are.
    """

    def __init__(self, message: str, *, num_tokens: int, context_tokens: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.context_tokens = context_tokens


class InsufficientMemory(IsothermError):
    """The forecast of weights, KV pages and work buffers does not fit; names each part in bytes."""


class DeviceNotFound(IsothermError):
    """No driver of a GPU, no such device, or one that lacks what the arithmetic contract needs; lists what there is."""


class DeviceFailed(IsothermError):
    """A driver refused a kernel, or a device was lost while it ran; names the device and the call."""


class ServerError(IsothermError):
    """No server of ours answers at the address, or it failed; names the address."""


class UnsupportedCpu(IsothermError):
    """The forced instruction set is unknown, or this processor lacks it."""
