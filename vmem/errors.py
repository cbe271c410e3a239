"""Every error that vkv raises on purpose, in one tree.

VkvError
├── UsageError (ValueError)        a value is wrong: the message names it and the remedy
│   ├── InvalidConfig              an option of a driver, pool, cache or engine
│   ├── InvalidSamplingParams      a sampling parameter
│   ├── InvalidPrompt              empty, wrong type, or no chat template to render it
│   ├── RequestTooLong             prompt and output exceed the slot
│   ├── RequestTooLarge            the page pool could never hold it
│   ├── BadCheckpoint              a model folder that cannot be loaded
│   ├── BadZoo                     a folder that is no zoo of blocks, or what is wrong in it
│   ├── UnknownModel               a name that no model of a zoo has
│   ├── ChainMismatch              two models of a zoo that cannot run together, and why
│   ├── UnsupportedModel           an architecture that cannot run here, and why
│   ├── BadAdapter                 a LoRA folder that is not read here, or of another base
│   ├── UnknownAdapter             a name or a digest that no loaded adapter has
│   ├── UnsupportedAttention       a backend that lacks what the model needs
│   └── QuantError                 a quantised tensor or checkpoint that cannot be right
│       └── UnsupportedQuantization  a known scheme that is not read here
├── KVFileError (RuntimeError)     a file of keys and values that is of no use: its name, and why
│   ├── KVFileInaccessible         missing, no plain file, no permission, no room on the disk
│   ├── KVFileDamaged              cut short, or other bytes than were written
│   └── KVFileMismatch             of another model or format, or no such file at all
├── TransferError (RuntimeError)   KV could not be moved: the other side, and what it did
├── Shortage (RuntimeError)        nothing was changed; it may succeed later
│   ├── OutOfPages                 the pool's limit is reached
│   │   └── OutOfLoans             nobody lends what a request lacks
│   ├── OutOfSlots                 every slot is taken
│   └── OutOfMappings              the budget of mappings is spent
├── DriverError (RuntimeError)     a system or driver call failed: which, and its status
│   └── DriverUnavailable          no such device or library here, and how to get it
├── NativeUnavailable (RuntimeError)  C kernels that are not built and cannot be compiled here
├── InvalidOperation (RuntimeError)  a call the address space's state forbids
│   └── SequenceGone               a sequence that is not in this engine, or not any more
├── StepFailed (RuntimeError)      the model itself failed under a batch of requests
├── EngineDied (RuntimeError)      the process that had the engine has ended
└── ForkedProcess (RuntimeError)   used in a forked child of the process that made it
"""


class VkvError(Exception):
    """The root of the tree: `except VkvError` catches all that vkv raises on purpose."""


class UsageError(VkvError, ValueError):
    """A value handed to vkv is wrong. The message names the value and the remedy."""


class InvalidConfig(UsageError):
    """An option is out of range, or two options contradict each other."""


class InvalidSamplingParams(UsageError):
    """A sampling parameter is unknown or impossible."""


class InvalidPrompt(UsageError):
    """A prompt is empty, of the wrong type, or cannot be rendered as a chat."""


class RequestTooLong(UsageError):
    """A prompt with its output does not fit into one slot (`max_len`)."""


class RequestTooLarge(UsageError):
    """A request that the page pool could not hold even if it were alone."""


class BadCheckpoint(UsageError):
    """A model folder is missing something or cannot be read."""


class BadZoo(UsageError):
    """A zoo of blocks that is none, cannot be written to, or is damaged; the message says which."""


class UnknownModel(UsageError):
    """A name that no model of the zoo has; the message names those that there are."""


class ChainMismatch(UsageError):
    """Two models of a zoo cannot run together; the message says what differs."""


class UnsupportedModel(UsageError):
    """An architecture that cannot run on contiguous slots, with the reason."""


class BadAdapter(UsageError):
    """A LoRA adapter that cannot be read, or does not fit the model; the message says why."""


class UnknownAdapter(UsageError):
    """A request names an adapter that is not loaded; the message names those that are."""


class UnsupportedAttention(UsageError):
    """The chosen attention backend lacks what the model asks; names those that have it."""


class QuantError(UsageError):
    """A quantised tensor or checkpoint that cannot be right; the message names the tensor."""


class UnsupportedQuantization(QuantError):
    """A scheme that is known to exist and is not read here; the message says what is."""


class KVFileError(VkvError, RuntimeError):
    """A file of keys and values cannot be used or written; the message names it and says why."""


class KVFileInaccessible(KVFileError):
    """The system will not have the file read or written: missing, forbidden, a full disk."""


class KVFileDamaged(KVFileError):
    """The file was cut short, or holds other bytes than were written."""


class KVFileMismatch(KVFileError):
    """The file is of another model, of another or a newer format, or no file of this kind."""


class TransferError(VkvError, RuntimeError):
    """KV could not be moved to another process: it died, fell silent, refused or sent garbage."""


class Shortage(VkvError, RuntimeError):
    """A resource ran short. Nothing was changed: the same call may succeed later."""


class OutOfPages(Shortage):
    """The page pool cannot supply the pages asked for within its limit."""


class OutOfLoans(OutOfPages):
    """No other engine has room for tokens that cannot stay here."""


class OutOfSlots(Shortage):
    """Every slot of the cache is in use."""


class OutOfMappings(Shortage):
    """Another mapping would exceed the budget kept below the system's own limit."""


class DriverError(VkvError, RuntimeError):
    """A system or driver call failed; the message names the call and its status."""


class DriverUnavailable(DriverError):
    """The device or its library is not here; the message says how to get it."""


class NativeUnavailable(VkvError, RuntimeError):
    """A library of C kernels is not built, and cannot be compiled here; the message says why."""


class InvalidOperation(VkvError, RuntimeError):
    """The state of the address space forbids the call: double map, stray unmap, live free."""


class SequenceGone(InvalidOperation):
    """A sequence was to leave an engine that does not have it, or not any more."""


class StepFailed(VkvError, RuntimeError):
    """The model raised while it computed a batch; what it raised is the cause."""


class EngineDied(VkvError, RuntimeError):
    """The process that had the engine has ended, and its requests with it."""


class ForkedProcess(VkvError, RuntimeError):
    """Something was used in a forked child; pages and mappings belong to the parent."""
