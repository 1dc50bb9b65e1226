"""From conversations to token rows, batches and the draft vocabulary, and answers to prompts."""

from jeagle.data.chat.parse_answer import parse_answer
from jeagle.data.chat.render import Rendered, render_prompt
from jeagle.data.chat.template_check import Outcome, check_template, sample_texts
from jeagle.data.chat.templates import (
    ConversationError,
    parse_arguments,
    reads_date,
    sampled_with,
    template_hash,
    tokenizer_hash,
    use_template,
)
from jeagle.data.display import describe_statistics, token_texts
from jeagle.data.near_duplicates import variety
from jeagle.data.preparation import ROWS, prepare_rows
from jeagle.data.regeneration.dialogue import Dialogue, read_back
from jeagle.data.regeneration.openai_client import AnswerServer, ask_server
from jeagle.data.regeneration.prompts import ANSWER_FILES, VARIETY, AnswerFile, read_prompts, read_rows
from jeagle.data.regeneration.self_instruct import WrittenPrompts, collect_prompts, prompt_requests
from jeagle.data.rows import RowStream, RowWriter, live_counts, load_rows, rows_of, unpack
from jeagle.data.sources.catalog import parse_source, source_fingerprint, starter_answers
from jeagle.data.vocabulary import (
    TABLES,
    choose_vocabulary,
    count_supervised,
    coverage,
    load_given_vocabulary,
    load_tables,
    save_tables,
    vocabulary_hash,
)
