/* The functions that run for every line or attribute, in C. `tailspan.logs.text`,
 * `tailspan.services.fused.stream` and `.window`, `tailspan_agent.otlp.wire`, `tailspan_agent.records.framing` and
 * `.severity`, and `tailspan_agent.job.line_sums` have the same functions in Python, with the same results; tests/unit/sdk/logs, tests/unit/sdk/services,
 * tests/unit/agent/otlp and tests/unit/agent/records compare them.
 * `tailspan_agent.otlp.requests` explains the format of a record.
 *
 * Only the limited API of Python 3.11 is used: one build serves all later versions. `frame` accepts exact types only and
 * takes every length from the object that it reads; a garbage collection may run Python code between measuring and
 * writing, so it checks the room for each record.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Compilers turn a row into one vector step: each byte of `found` counts its own column, as long as it cannot overflow. */
#define ROW 32
#define ROWS 255

PyDoc_STRVAR(count_lines_doc, "count_lines(text, /)\n--\n\n"
"See `tailspan.logs.text.count_lines`.");

static PyObject *count_lines(PyObject *Py_UNUSED(module), PyObject *text)
{
    char *bytes;
    Py_ssize_t length, lines = 0;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0) return NULL;
    while (length >= ROW) {
        unsigned char found[ROW] = {0};
        for (int row = 0; row < ROWS && length >= ROW; row++, bytes += ROW, length -= ROW)
            for (int i = 0; i < ROW; i++) found[i] += bytes[i] == '\n';
        for (int i = 0; i < ROW; i++) lines += found[i];
    }
    for (Py_ssize_t i = 0; i < length; i++) lines += bytes[i] == '\n';
    return PyLong_FromSsize_t(lines);
}

PyDoc_STRVAR(lines_end_doc, "lines_end(text, start, count, /)\n--\n\n"
"See `tailspan.logs.text.lines_end_in_python`.");

static PyObject *lines_end(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *text;
    char *bytes;
    Py_ssize_t start, count, length;
    if (!PyArg_ParseTuple(args, "Snn", &text, &start, &count) || PyBytes_AsStringAndSize(text, &bytes, &length) < 0)
        return NULL;
    for (; count > 0; count--) {
        const char *end = start >= 0 && start < length ? memchr(bytes + start, '\n', (size_t)(length - start)) : NULL;
        if (end == NULL) return PyErr_Format(PyExc_ValueError, "the text has fewer lines");
        start = end + 1 - bytes;
    }
    return PyLong_FromSsize_t(start);
}

#define MAX_FIELDS 255
#define MAX_NUMBERED 5000 /* MAX_PAGE_LINES of tailspan.logs.page */
#define MAX_PAGE_BYTES (1 << 20)
#define MAX_MS 9223372036854 /* of tailspan.services.fused.stream */
#define DIGEST_BYTES 8
#define TIME_BYTES 9
#define FAILED (-1)
#define TOO_LONG (-2)

typedef struct {
    const char *bytes;
    Py_ssize_t length;
} Piece;

static int piece_of(PyObject *object, Piece *piece)
{
    char *bytes;
    if (object == NULL || PyBytes_AsStringAndSize(object, &bytes, &piece->length) < 0) return -1;
    piece->bytes = bytes;
    return 0;
}

/* Reads the lines of a page in order, from a list or from a text with a newline after each. */
typedef struct {
    PyObject *list; /* NULL: the lines are a text */
    Py_ssize_t index;
    Piece text; /* the part that is still to be read */
} Cursor;

static int lines_of(PyObject *object, Cursor *lines)
{
    *lines = (Cursor){0};
    if (!PyList_Check(object)) return piece_of(object, &lines->text);
    lines->list = object;
    return 0;
}

static int next_line(Cursor *lines, Piece *line)
{
    if (lines->list != NULL) return piece_of(PyList_GetItem(lines->list, lines->index++), line);
    const char *end = lines->text.length ? memchr(lines->text.bytes, '\n', (size_t)lines->text.length) : NULL;
    if (end == NULL) {
        PyErr_SetString(PyExc_IndexError, "the text has fewer lines");
        return -1;
    }
    line->bytes = lines->text.bytes;
    line->length = end - line->bytes;
    lines->text.bytes = end + 1;
    lines->text.length -= line->length + 1;
    return 0;
}

static Py_ssize_t count_of(const Cursor *lines)
{
    if (lines->list != NULL) return PyList_Size(lines->list);
    Py_ssize_t count = 0;
    const char *at = lines->text.bytes, *end = at + lines->text.length;
    for (; at < end && (at = memchr(at, '\n', (size_t)(end - at))) != NULL; at++) count++;
    return count;
}

static int no_more(const Cursor *lines)
{
    if (lines->list != NULL ? lines->index == PyList_Size(lines->list) : lines->text.length == 0) return 0;
    PyErr_SetString(PyExc_ValueError, "the page has more lines");
    return -1;
}

/* The levels of `tailspan_agent.records.severity`, in the order of its table: of each in capitals, small letters, and
 * with a capital. */
static const char *const levels[] = {"TRACE", "DEBUG", "INFO", "NOTICE", "SUCCESS", "WARN", "WARNING", "ERR", "ERROR",
                                     "SEVERE", "CRITICAL", "FATAL", "PANIC", "ALERT", "EMERGENCY"};
#define LEVELS (Py_ssize_t)(sizeof levels / sizeof *levels)
#define LONGEST_LEVEL 9
#define UNSPECIFIED 0
#define INFO 7
#define WARNING 19
#define ERROR 25
#define FATAL 34
#define HEAD_BYTES 120
#define JSON_HEAD_BYTES 2048
#define KEY_BYTES 24
#define MOST_INDENT 40

/* The classes of ASCII characters: one look-up for each byte of a line. */
enum { DIGIT = 1, ALNUM = 2, WORD = 4, SPACE = 8, OF_TIME = 16, OF_NAME = 32, CLOSER = 64, OF_LEVEL = 128 };
static unsigned char classes[256];

static void add_class(const char *characters, unsigned char class)
{
    for (; *characters != '\0'; characters++) classes[(unsigned char)*characters] |= class;
}

static void fill_classes(void)
{
    add_class("0123456789", DIGIT | ALNUM | WORD | OF_TIME | OF_NAME);
    add_class("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", ALNUM | WORD | OF_NAME);
    add_class("_", WORD | OF_NAME);
    add_class(" \t\n\v\f\r", SPACE);
    add_class(".,:+Z-", OF_TIME);
    add_class(".:$/@-", OF_NAME);
    add_class("]})|", CLOSER);
    for (Py_ssize_t level = 0; level < LEVELS; level++) {
        const char first[] = {levels[level][0], (char)(levels[level][0] | 0x20), '\0'};
        add_class(first, OF_LEVEL);
    }
}

static int is(char c, unsigned char class) { return classes[(unsigned char)c] & class; }
static int is_upper(char c) { return (unsigned char)(c - 'A') < 26; }
static int is_lower(char c) { return (unsigned char)(c - 'a') < 26; }
static int is_one_of(char c, const char *set)
{
    while (*set != '\0' && *set != c) set++;
    return *set != '\0';
}

/* Return the place of a word in the table of severities, or UNSPECIFIED. */
static int level_of(const char *word, Py_ssize_t length)
{
    if (length < 3 || length > LONGEST_LEVEL || !is(word[0], OF_LEVEL)) return UNSPECIFIED;
    int capitals = 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        if (is_upper(word[i])) capitals++;
        else if (!is_lower(word[i])) return UNSPECIFIED;
    }
    int form = capitals == length ? 0 : capitals == 0 ? 1 : capitals == 1 && is_upper(word[0]) ? 2 : -1;
    for (Py_ssize_t level = 0; form >= 0 && level < LEVELS; level++) {
        const char *name = levels[level];
        Py_ssize_t i = 0;
        while (i < length && (word[i] & ~0x20) == name[i]) i++;
        if (i == length && name[i] == '\0') return (int)(1 + 3 * level + form);
    }
    return UNSPECIFIED;
}

/* The functions below have the names and the meaning of those in `tailspan_agent.records.severity`. */

static int start_of(Piece line)
{
    const char *at = line.bytes;
    static const char glog[] = "?0000 00:00:00";
    if (line.length >= (Py_ssize_t)sizeof glog - 1 && is(at[1], DIGIT) && is_one_of(*at, "IWEF")) {
        int i = 1;
        while (glog[i] != '\0' && (glog[i] == '0' ? is(at[i], DIGIT) : at[i] == glog[i])) i++;
        if (glog[i] == '\0') return *at == 'I' ? INFO : *at == 'W' ? WARNING : *at == 'E' ? ERROR : FATAL;
    }
    Py_ssize_t start = 0, end;
    while (start < MOST_INDENT && start < line.length && is(at[start], SPACE)) start++;
    for (end = start; end < line.length && end - start <= LONGEST_LEVEL && is(at[end], ALNUM);) end++;
    return end < line.length && at[end] == ':' ? level_of(at + start, end - start) : UNSPECIFIED;
}

static int ends_with(const char *text, Py_ssize_t length, const char *end)
{
    Py_ssize_t size = (Py_ssize_t)strlen(end);
    return length >= size && memcmp(text + length - size, end, (size_t)size) == 0;
}

static int is_after_json_key(const char *head, Py_ssize_t start)
{
    static const char *const keys[] = {"\"level\"", "\"severity\"", "\"levelname\"", "\"lvl\"", "\"log.level\"",
                                       "\"log_level\""};
    Py_ssize_t least = start > KEY_BYTES ? start - KEY_BYTES : 0, at = start;
    if (at == least || head[--at] != '"') return 0;
    for (int i = 0; i < 4 && at > least && is(head[at - 1], SPACE); i++) at--;
    if (at == least || head[--at] != ':') return 0;
    for (int i = 0; i < 4 && at > least && is(head[at - 1], SPACE); i++) at--;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (ends_with(head + least, at - least, keys[i])) return 1;
    return 0;
}

static int is_after_key(const char *head, Py_ssize_t start)
{
    static const char *const keys[] = {"level=", "lvl=", "severity="};
    Py_ssize_t least = start > KEY_BYTES ? start - KEY_BYTES : 0, at = start;
    if (at > least && is_one_of(head[at - 1], "\"'")) at--;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (!ends_with(head + least, at - least, keys[i])) continue;
        Py_ssize_t key = at - (Py_ssize_t)strlen(keys[i]);
        if (key == 0 || (key > least && is(head[key - 1], SPACE))) return 1;
    }
    return 0;
}

static int is_after_time(const char *left, Py_ssize_t length)
{
    for (int token = 0; token < 2; token++) {
        Py_ssize_t end = length;
        while (end > 0 && is(left[end - 1], SPACE)) end--;
        if (end == length) return 0;
        Py_ssize_t at = end;
        while (at > 0 && is(left[at - 1], OF_TIME)) at--;
        for (; at + 5 <= end; at++)
            if (is(left[at], DIGIT) && is(left[at + 1], DIGIT) && left[at + 2] == ':' && is(left[at + 3], DIGIT) &&
                is(left[at + 4], DIGIT))
                return 1;
        length = end;
        while (length > 0 && is(left[length - 1], OF_NAME)) length--;
        if (length == end) return 0;
    }
    return 0;
}

static int is_before_structure(const char *head, Py_ssize_t at, Py_ssize_t length)
{
    Py_ssize_t spaces = 0;
    while (at + spaces < length && is(head[at + spaces], SPACE)) spaces++;
    at += spaces;
    if (at == length) return 0;
    if (is_one_of(head[at], ":]|")) return 1;
    if (spaces) return head[at] == '-' && at + 1 < length && is(head[at + 1], SPACE);
    return head[at] == '/';
}

static int is_after_structure(const char *head, Py_ssize_t before)
{
    char last = before > 0 ? head[before - 1] : '\0', other = before > 1 ? head[before - 2] : '\0';
    return is(last, CLOSER) || (last == ':' && is(other, CLOSER)) || (last == '-' && other == ' ');
}

static int can_begin_level(const char *head, Py_ssize_t start)
{
    return start > 0 && (is(head[start - 1], SPACE) || is_one_of(head[start - 1], "[|:"));
}

/* Return whether the text before a word in capitals makes it a level, whatever follows. */
static int is_level_by_start(const char *head, Py_ssize_t start)
{
    Py_ssize_t before = start;
    while (before > 0 && is(head[before - 1], SPACE)) before--;
    return can_begin_level(head, start) && (is_after_structure(head, before) || is_after_time(head, start));
}

static int is_level_of_text(const char *head, Py_ssize_t length, Py_ssize_t start, Py_ssize_t end, int is_capital)
{
    Py_ssize_t before = start, inner = end;
    while (before > 0 && is(head[before - 1], SPACE)) before--;
    char opener = before ? head[before - 1] : '\0';
    int is_code = opener == '[' && before > 1 && is(head[before - 2], ALNUM);
    char closer = opener == '[' && !is_code ? ']' : opener == '|' && is_capital ? '|' : '\0';
    while (inner < length && head[inner] == ' ') inner++;
    if (closer && inner < length && head[inner] == closer) return 1;
    if (is_one_of(opener, "=\"'") && is_after_key(head, start)) return 1;
    if (!is_capital) return 0;
    if (before == 0 && (end == length || is(head[end], SPACE))) return 1;
    if (can_begin_level(head, start) && is_before_structure(head, end, length)) return 1;
    return is_level_by_start(head, start);
}

static int is_after_opener(const char *head, Py_ssize_t start)
{
    while (start > 0 && head[start - 1] == ' ') start--;
    return start > 0 && is_one_of(head[start - 1], "[=\"'");
}

/* Return whether two texts differ in digits only. */
static int is_alike(const char *text, const char *other, Py_ssize_t length)
{
    Py_ssize_t at = 0;
    while (at < length) {
        if (at + 8 <= length && memcmp(text + at, other + at, 8) == 0) at += 8;
        else if (text[at] == other[at] || (is(text[at], DIGIT) && is(other[at], DIGIT))) at++;
        else return 0;
    }
    return 1;
}

/* The text before the level of an earlier line, without another word of the table. A line that starts alike has none
 * there either, so the search starts behind it. */
typedef struct {
    const char *head;
    Py_ssize_t length;
    int is_level; /* whether a word in capitals that follows is a level */
} Known;

static int find_severity(Piece line, Known *known)
{
    int started = start_of(line);
    if (started) return started;
    const char *head = line.bytes;
    Py_ssize_t length = line.length, at = 0;
    int is_json = length > 1 && *head == '{' && (head[1] == '"' || (length > 2 && head[1] == ' ' && head[2] == '"'));
    Py_ssize_t most = is_json ? JSON_HEAD_BYTES : HEAD_BYTES;
    if (length > most) length = most;
    int is_known = known->length < length && is_alike(head, known->head, known->length), is_first = 1;
    if (is_known) at = known->length;
    while (at < length) {
        while (at < length && !is(head[at], WORD)) at++;
        Py_ssize_t start = at;
        while (at < length && is(head[at], WORD)) at++;
        int level = level_of(head + start, at - start);
        if (level == UNSPECIFIED) continue;
        int is_capital = level % 3 == 1;
        int is_level = is_known && known->is_level && is_capital && start == known->length;
        if (is_level) return level;
        if (is_capital || is_after_opener(head, start))
            is_level = is_json ? at < length && head[at] == '"' && is_after_json_key(head, start)
                               : is_level_of_text(head, length, start, at, is_capital);
        if (is_level) {
            if (is_first) *known = (Known){head, start, !is_json && is_level_by_start(head, start)};
            return level;
        }
        is_first = 0;
    }
    return UNSPECIFIED;
}

PyDoc_STRVAR(find_severities_doc,
"find_severities(lines, /)\n--\n\n"
"See `tailspan_agent.records.severity.find_severities_in_python`.");

static PyObject *find_severities(PyObject *Py_UNUSED(module), PyObject *object)
{
    Cursor lines;
    if (lines_of(object, &lines) < 0) return NULL;
    Known known = {NULL, 0, 0};
    Py_ssize_t count = count_of(&lines);
    PyObject *found = PyBytes_FromStringAndSize(NULL, count);
    char *places = found != NULL ? PyBytes_AsString(found) : NULL;
    for (Py_ssize_t i = 0; found != NULL && i < count; i++) {
        Piece line;
        if (next_line(&lines, &line) < 0) Py_CLEAR(found);
        else places[i] = (char)find_severity(line, &known);
    }
    return found;
}

static int varint_length(uint64_t value)
{
    int length = 1;
    while (value >= 0x80) {
        value >>= 7;
        length++;
    }
    return length;
}

static char *put_varint(char *at, uint64_t value)
{
    while (value >= 0x80) {
        *at++ = (char)(value | 0x80);
        value >>= 7;
    }
    *at++ = (char)value;
    return at;
}

static char *put(char *at, Piece piece)
{
    memcpy(at, piece.bytes, (size_t)piece.length);
    return at + piece.length;
}

static char *put_hex(char *at, const char *bytes, size_t count)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        *at++ = digits[(unsigned char)bytes[i] >> 4];
        *at++ = digits[bytes[i] & 15];
    }
    return at;
}

static char *put_time(char *at, uint64_t time)
{
    *at++ = 0x09; /* LogRecord.time_unix_nano, fixed64 */
    for (int i = 0; i < 8; i++) *at++ = (char)(time >> 8 * i);
    return at;
}

typedef struct {
    PyObject *lines, *runs;
    Piece severities, digests;
    Piece fields[MAX_FIELDS];
    Py_ssize_t field_count, max_body;
} Page;

typedef struct {
    Py_ssize_t lines;
    uint64_t time;
    Piece shared;
} Run;

static int run_at(PyObject *runs, Py_ssize_t index, Run *run)
{
    PyObject *tuple = PyList_GetItem(runs, index);
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_Size(tuple) != 3) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a run must be a tuple of three");
        return -1;
    }
    run->lines = PyLong_AsSsize_t(PyTuple_GetItem(tuple, 0));
    if (PyErr_Occurred()) return -1;
    run->time = PyLong_AsUnsignedLongLong(PyTuple_GetItem(tuple, 1));
    return PyErr_Occurred() ? -1 : piece_of(PyTuple_GetItem(tuple, 2), &run->shared);
}

/* One record: its line, and the length in bytes of its body, of its fields, and of the record with tag and length. */
typedef struct {
    Piece line, severity;
    uint64_t body, fields, record;
} Record;

static void measure(const Page *page, const Run *run, Record *record)
{
    uint64_t length = (uint64_t)record->line.length;
    record->body = 1 + varint_length(length) + length;
    record->fields = record->severity.length + 1 + varint_length(record->body) + record->body + TIME_BYTES +
                     run->shared.length + (page->digests.length ? 2 * DIGEST_BYTES : 4);
    record->record = 1 + varint_length(record->fields) + record->fields;
}

static char *put_record(char *at, const Record *record, const Run *run, Py_ssize_t ordinal, const char *digest)
{
    *at++ = 0x12; /* ScopeLogs.log_records */
    at = put_varint(at, record->fields);
    at = put(at, record->severity);
    *at++ = 0x2a; /* LogRecord.body */
    at = put_varint(at, record->body);
    *at++ = 0x0a; /* AnyValue.string_value */
    at = put_varint(at, (uint64_t)record->line.length);
    at = put(at, record->line);
    at = put_time(at, run->time + (uint64_t)ordinal);
    at = put(at, run->shared);
    if (digest != NULL) return put_hex(at, digest, DIGEST_BYTES);
    char number[] = {(char)(ordinal >> 8), (char)ordinal};
    return put_hex(at, number, sizeof number);
}

/* The records of a page in pieces, as many records in each as fit. */
typedef struct {
    Py_ssize_t most, copied; /* the most that a piece may take in a store that adds `copied` bytes to each record */
    Py_ssize_t length, count; /* of the piece that is being measured */
    PyObject *list; /* of the pieces: bytes, and their number of records */
} Pieces;

static int end_piece(Pieces *pieces)
{
    if (!pieces->count) return 0;
    PyObject *piece = PyBytes_FromStringAndSize(NULL, pieces->length);
    PyObject *pair = piece != NULL ? Py_BuildValue("Nn", piece, pieces->count) : NULL;
    int failed = pair == NULL || PyList_Append(pieces->list, pair) < 0;
    Py_XDECREF(pair);
    pieces->length = pieces->count = 0;
    return failed ? -1 : 0;
}

static int add_record(Pieces *pieces, uint64_t record)
{
    if (record > (uint64_t)(PY_SSIZE_T_MAX / 2 - pieces->length)) {
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t length = pieces->length + (Py_ssize_t)record;
    int fits = length <= pieces->most && pieces->copied <= (pieces->most - length) / (pieces->count + 1);
    if (!fits && end_piece(pieces) < 0) return -1;
    pieces->length += (Py_ssize_t)record;
    pieces->count++;
    return 0;
}

/* Where the next record is written. */
typedef struct {
    PyObject *list; /* NULL: nothing is written yet */
    Py_ssize_t next; /* index of the next piece */
    char *at;
    Py_ssize_t left; /* bytes of this piece */
} Output;

static int make_room(Output *output, uint64_t record)
{
    while (output->left == 0) {
        PyObject *pair = PyList_GetItem(output->list, output->next++);
        Piece piece;
        if (pair == NULL || piece_of(PyTuple_GetItem(pair, 0), &piece) < 0) return -1;
        output->at = (char *)piece.bytes;
        output->left = piece.length;
    }
    if (record > (uint64_t)output->left) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        return -1;
    }
    output->left -= (Py_ssize_t)record;
    return 0;
}

/* Measure the records of all lines, and make the pieces for them; or write them, if `output` has a list.
 * Return 0, FAILED, or TOO_LONG. */
static int write_records(const Page *page, Pieces *pieces, Output *output)
{
    Py_ssize_t index = 0, count = page->severities.length, runs = PyList_Size(page->runs);
    Cursor lines;
    if (lines_of(page->lines, &lines) < 0) return FAILED;
    for (Py_ssize_t r = 0; r < runs; r++) {
        Run run;
        if (run_at(page->runs, r, &run) < 0) return FAILED;
        int can_be_numbered = run.lines <= MAX_NUMBERED || page->digests.length;
        if (run.lines < 0 || run.lines > count - index || !can_be_numbered) {
            PyErr_SetString(PyExc_ValueError, "a run has too many lines");
            return FAILED;
        }
        for (Py_ssize_t ordinal = 0; ordinal < run.lines; ordinal++, index++) {
            unsigned char severity = (unsigned char)page->severities.bytes[index];
            Record record;
            if (next_line(&lines, &record.line) < 0) return FAILED;
            if (severity >= page->field_count) continue;
            if (record.line.length > page->max_body) return TOO_LONG;
            record.severity = page->fields[severity];
            measure(page, &run, &record);
            if (output->list == NULL) {
                if (add_record(pieces, record.record) < 0) return FAILED;
                continue;
            }
            if (make_room(output, record.record) < 0) return FAILED;
            const char *digest = page->digests.length ? page->digests.bytes + DIGEST_BYTES * index : NULL;
            output->at = put_record(output->at, &record, &run, ordinal, digest);
        }
    }
    if (index != count) {
        PyErr_SetString(PyExc_ValueError, "the runs have fewer lines");
        return FAILED;
    }
    return no_more(&lines) < 0 || end_piece(pieces) < 0 ? FAILED : 0;
}

PyDoc_STRVAR(frame_doc,
"frame(lines, severities, fields, runs, digests, max_body, most, copied, /)\n--\n\n"
"See `tailspan_agent.records.framing.frame`.");

static PyObject *frame(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *severities, *fields, *digests;
    Page page;
    Pieces pieces = {0};
    Output output = {0};
    if (!PyArg_ParseTuple(args, "OSO!O!Snnn", &page.lines, &severities, &PyTuple_Type, &fields, &PyList_Type, &page.runs,
                          &digests, &page.max_body, &pieces.most, &pieces.copied))
        return NULL;
    if (pieces.most < 0 || pieces.copied < 0) return PyErr_Format(PyExc_ValueError, "a limit is negative");
    page.field_count = PyTuple_Size(fields);
    if (page.field_count > MAX_FIELDS) return PyErr_Format(PyExc_ValueError, "there are more than 255 severities");
    for (Py_ssize_t i = 0; i < page.field_count; i++)
        if (piece_of(PyTuple_GetItem(fields, i), &page.fields[i]) < 0) return NULL;
    if (piece_of(severities, &page.severities) < 0 || piece_of(digests, &page.digests) < 0) return NULL;
    if (page.digests.length && page.digests.length != DIGEST_BYTES * page.severities.length)
        return PyErr_Format(PyExc_ValueError, "there must be as many digests as lines");
    if ((pieces.list = PyList_New(0)) == NULL) return NULL;
    int result = write_records(&page, &pieces, &output);
    output.list = pieces.list;
    if (result == 0) result = write_records(&page, &pieces, &output);
    if (result == 0 && (output.left || output.next != PyList_Size(pieces.list))) {
        PyErr_SetString(PyExc_SystemError, "the lines changed while they were framed");
        result = FAILED;
    }
    if (result == 0) return pieces.list;
    Py_DECREF(pieces.list);
    if (result == TOO_LONG) Py_RETURN_NONE;
    return NULL;
}

/* The value of an attribute; `body` is the length of its AnyValue without the length of a text. */
typedef struct {
    char tag; /* of the AnyValue's field */
    Piece text;
    uint64_t number;
    uint64_t body;
} Value;

static uint64_t field_length(uint64_t length) { return 1 + varint_length(length) + length; }

static int text_of(PyObject *object, Piece *text)
{
    if ((text->bytes = PyUnicode_AsUTF8AndSize(object, &text->length)) != NULL) return 1;
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* Return 1; 0 for what only the form in Python encodes; -1 for an error. */
static int value_of(PyObject *object, Value *value)
{
    if (PyUnicode_Check(object)) {
        value->tag = 0x0a;
        int known = text_of(object, &value->text);
        if (known == 1) value->body = field_length((uint64_t)value->text.length);
        return known;
    }
    if (PyLong_Check(object)) {
        int overflow;
        value->tag = PyBool_Check(object) ? 0x10 : 0x18;
        value->number = (uint64_t)PyLong_AsLongLongAndOverflow(object, &overflow);
        value->body = 1 + varint_length(value->number);
        return overflow == 0;
    }
    if (PyFloat_Check(object)) {
        double number = PyFloat_AsDouble(object);
        value->tag = 0x21;
        memcpy(&value->number, &number, sizeof number);
        value->body = 9;
        return 1;
    }
    return 0;
}

static char *put_value(char *at, const Value *value)
{
    *at++ = value->tag;
    if (value->tag == 0x0a) return put(put_varint(at, (uint64_t)value->text.length), value->text);
    if (value->tag != 0x21) return put_varint(at, value->number);
    for (int i = 0; i < 8; i++) *at++ = (char)(value->number >> 8 * i);
    return at;
}

PyDoc_STRVAR(usual_attributes_doc, "usual_attributes(number, attributes, /)\n--\n\n"
"See `tailspan_agent.otlp.wire.attributes_fields`; None for attributes that only the form in Python encodes.");

static PyObject *usual_attributes(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned char number;
    PyObject *attributes, *encoded = NULL;
    if (!PyArg_ParseTuple(args, "bO", &number, &attributes)) return NULL;
    if (!PyDict_CheckExact(attributes)) Py_RETURN_NONE;
    /* Measured first, then written. Nothing in between runs Python code. */
    for (char *at = NULL, *end = NULL;;) {
        PyObject *key, *object;
        Py_ssize_t position = 0;
        uint64_t length = 0;
        while (PyDict_Next(attributes, &position, &key, &object)) {
            Piece name;
            Value value;
            int known = PyUnicode_Check(key) ? text_of(key, &name) : 0;
            if (known == 1) known = value_of(object, &value);
            if (known != 1) {
                Py_XDECREF(encoded);
                if (known < 0) return NULL;
                Py_RETURN_NONE;
            }
            uint64_t pair = field_length((uint64_t)name.length) + field_length(value.body);
            uint64_t field = varint_length((uint64_t)number << 3) + varint_length(pair) + pair;
            length += field;
            if (at == NULL) continue;
            if (field > (uint64_t)(end - at)) break;
            at = put_varint(put_varint(at, (uint64_t)number << 3 | 2), pair);
            *at++ = 0x0a; /* KeyValue.key */
            at = put(put_varint(at, (uint64_t)name.length), name);
            *at++ = 0x12; /* KeyValue.value */
            at = put_value(put_varint(at, value.body), &value);
        }
        if (at != NULL && at == end) return encoded;
        if (at != NULL) {
            Py_DECREF(encoded);
            return PyErr_Format(PyExc_SystemError, "the attributes changed while they were encoded");
        }
        if (length > PY_SSIZE_T_MAX) return PyErr_NoMemory();
        if ((encoded = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length)) == NULL || length == 0) return encoded;
        at = PyBytes_AsString(encoded);
        end = at + length;
    }
}

/* BLAKE2b without a key (RFC 7693), of which only the first 8 bytes are used: the digest of a line. */
#define BLOCK_BYTES 128

typedef struct {
    uint64_t state[8], hashed;
    unsigned char block[BLOCK_BYTES];
    size_t filled;
} Blake2b;

static const uint64_t blake2b_start[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                          0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                          0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
static const unsigned char orders[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

static uint64_t little_endian(const unsigned char *bytes)
{
    return (uint64_t)bytes[0] | (uint64_t)bytes[1] << 8 | (uint64_t)bytes[2] << 16 | (uint64_t)bytes[3] << 24 |
           (uint64_t)bytes[4] << 32 | (uint64_t)bytes[5] << 40 | (uint64_t)bytes[6] << 48 | (uint64_t)bytes[7] << 56;
}

#define TURN(word, bits) ((word) >> (bits) | (word) << (64 - (bits)))
#define MIX(a, b, c, d, first, second) \
    do { \
        v[a] += v[b] + m[first]; \
        v[d] = TURN(v[d] ^ v[a], 32); \
        v[c] += v[d]; \
        v[b] = TURN(v[b] ^ v[c], 24); \
        v[a] += v[b] + m[second]; \
        v[d] = TURN(v[d] ^ v[a], 16); \
        v[c] += v[d]; \
        v[b] = TURN(v[b] ^ v[c], 63); \
    } while (0)
/* With a constant number, so that the compiler knows which words each round takes. */
#define ROUND(i) \
    do { \
        MIX(0, 4, 8, 12, orders[i][0], orders[i][1]); \
        MIX(1, 5, 9, 13, orders[i][2], orders[i][3]); \
        MIX(2, 6, 10, 14, orders[i][4], orders[i][5]); \
        MIX(3, 7, 11, 15, orders[i][6], orders[i][7]); \
        MIX(0, 5, 10, 15, orders[i][8], orders[i][9]); \
        MIX(1, 6, 11, 12, orders[i][10], orders[i][11]); \
        MIX(2, 7, 8, 13, orders[i][12], orders[i][13]); \
        MIX(3, 4, 9, 14, orders[i][14], orders[i][15]); \
    } while (0)

static void hash_block(Blake2b *hash, int is_last)
{
    uint64_t v[16], m[16];
    for (int i = 0; i < 8; i++) v[i] = hash->state[i];
    for (int i = 0; i < 8; i++) v[8 + i] = blake2b_start[i];
    for (int i = 0; i < 16; i++) m[i] = little_endian(hash->block + 8 * i);
    v[12] ^= hash->hashed;
    if (is_last) v[14] = ~v[14];
    ROUND(0);
    ROUND(1);
    ROUND(2);
    ROUND(3);
    ROUND(4);
    ROUND(5);
    ROUND(6);
    ROUND(7);
    ROUND(8);
    ROUND(9);
    ROUND(0);
    ROUND(1);
    for (int i = 0; i < 8; i++) hash->state[i] ^= v[i] ^ v[8 + i];
}

static void begin_hash(Blake2b *hash)
{
    memset(hash, 0, sizeof *hash);
    memcpy(hash->state, blake2b_start, sizeof blake2b_start);
    hash->state[0] ^= 0x01010000 ^ DIGEST_BYTES;
}

static void add_to_hash(Blake2b *hash, Piece piece)
{
    while (piece.length) {
        if (hash->filled == BLOCK_BYTES) {
            hash->hashed += BLOCK_BYTES;
            hash_block(hash, 0);
            hash->filled = 0;
        }
        size_t room = BLOCK_BYTES - hash->filled, taken = (size_t)piece.length < room ? (size_t)piece.length : room;
        memcpy(hash->block + hash->filled, piece.bytes, taken);
        hash->filled += taken;
        piece.bytes += taken;
        piece.length -= (Py_ssize_t)taken;
    }
}

static uint64_t end_hash(Blake2b *hash)
{
    hash->hashed += hash->filled;
    memset(hash->block + hash->filled, 0, BLOCK_BYTES - hash->filled);
    hash_block(hash, 1);
    return hash->state[0];
}

/* A set of digests; an empty place is 0. */
typedef struct {
    uint64_t *places;
    size_t mask;
} Digests;

/* Return whether a digest was not in the set. 0 is never new. */
static int add_digest(Digests *set, uint64_t digest)
{
    size_t at = (size_t)digest & set->mask;
    while (set->places[at] != 0 && set->places[at] != digest) at = (at + 1) & set->mask;
    int is_new = set->places[at] != digest;
    set->places[at] = digest;
    return is_new;
}

#define TIME_KEY_BYTES 32

/* Return a time in ns as a decimal number, and what follows in the key of a line that has no equal before it. */
static Piece time_key(char *room, uint64_t ms)
{
    static const char behind[] = "000000\0000"; /* ms in ns; the number of equal lines before it is 0 */
    char *end = room + TIME_KEY_BYTES, *at = end - sizeof behind;
    memcpy(at, behind, sizeof behind);
    if (ms == 0) at += 5;
    for (; ms != 0; ms /= 10) *--at = (char)('0' + ms % 10);
    return (Piece){at, end - at};
}

/* Return 1; 0 if two digests are equal; -1 for an error. */
static int hash_lines(Piece key, Cursor *lines, PyObject *instants, PyObject *counts, Digests *set, char *digests)
{
    Blake2b begun;
    begin_hash(&begun);
    add_to_hash(&begun, key);
    for (Py_ssize_t i = 0, left = count_of(lines); i < PyList_Size(instants); i++) {
        char room[TIME_KEY_BYTES];
        Piece time = time_key(room, PyLong_AsUnsignedLongLong(PyList_GetItem(instants, i)));
        Py_ssize_t count = PyLong_AsSsize_t(PyList_GetItem(counts, i));
        if (PyErr_Occurred()) return -1;
        if (count < 0 || count > left) {
            PyErr_SetString(PyExc_ValueError, "there are fewer lines");
            return -1;
        }
        Blake2b timed = begun;
        add_to_hash(&timed, time);
        for (left -= count; count > 0; count--, digests += DIGEST_BYTES) {
            Blake2b hash = timed;
            Piece line;
            if (next_line(lines, &line) < 0) return -1;
            add_to_hash(&hash, line);
            uint64_t digest = end_hash(&hash);
            if (!add_digest(set, digest)) return 0;
            for (int byte = 0; byte < DIGEST_BYTES; byte++) digests[byte] = (char)(digest >> 8 * byte);
        }
    }
    return no_more(lines) < 0 ? -1 : 1;
}

PyDoc_STRVAR(distinct_digests_doc, "distinct_digests(key, lines, instants_ms, counts, known, /)\n--\n\n"
"See `tailspan.services.fused.window.distinct_digests_in_python`.");

static PyObject *distinct_digests(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *object, *instants, *counts, *digests = NULL;
    Piece key, known;
    Cursor lines;
    if (!PyArg_ParseTuple(args, "y#OO!O!y#", &key.bytes, &key.length, &object, &PyList_Type, &instants, &PyList_Type,
                          &counts, &known.bytes, &known.length))
        return NULL;
    if (lines_of(object, &lines) < 0) return NULL;
    if (PyList_Size(instants) != PyList_Size(counts))
        return PyErr_Format(PyExc_ValueError, "there must be as many counts as instants");
    Py_ssize_t count = count_of(&lines);
    Digests set = {NULL, 1};
    while (set.mask < 2 * (size_t)(count + known.length / DIGEST_BYTES)) set.mask *= 2;
    if ((set.places = PyMem_Calloc(set.mask--, sizeof *set.places)) == NULL) return PyErr_NoMemory();
    for (; known.length >= DIGEST_BYTES; known.bytes += DIGEST_BYTES, known.length -= DIGEST_BYTES)
        add_digest(&set, little_endian((const unsigned char *)known.bytes));
    int result = -1;
    if ((digests = PyBytes_FromStringAndSize(NULL, DIGEST_BYTES * count)) != NULL)
        result = hash_lines(key, &lines, instants, counts, &set, PyBytes_AsString(digests));
    PyMem_Free(set.places);
    if (result == 1) return digests;
    Py_XDECREF(digests);
    if (result == 0) Py_RETURN_NONE;
    return NULL;
}

PyDoc_STRVAR(sum_digests_doc, "sum_digests(digests, /)\n--\n\n"
"See `tailspan_agent.job.line_sums.sum_digests_in_python`.");

static PyObject *sum_digests(PyObject *Py_UNUSED(module), PyObject *object)
{
    Piece digests;
    uint64_t sum = 0;
    if (piece_of(object, &digests) < 0) return NULL;
    for (; digests.length >= DIGEST_BYTES; digests.bytes += DIGEST_BYTES, digests.length -= DIGEST_BYTES) {
        uint64_t uid = 0;
        for (int byte = 0; byte < DIGEST_BYTES; byte++) uid = uid << 8 | (unsigned char)digests.bytes[byte];
        sum += uid;
    }
    return PyLong_FromUnsignedLongLong(sum);
}

/* A JSON text, and where its next token is. Each reader returns 0, or NULL, for what only the form in Python reads. */
typedef struct {
    const char *at, *end;
} Json;

static void skip_spaces(Json *json)
{
    while (json->at < json->end && *json->at <= ' ' && is_one_of(*json->at, " \n\r\t")) json->at++;
}

static int read_mark(Json *json, char mark)
{
    skip_spaces(json);
    if (json->at == json->end || *json->at != mark) return 0;
    json->at++;
    return 1;
}

static char *put_character(char *at, uint32_t code)
{
    if (code < 0x80) {
        *at++ = (char)code;
        return at;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char first[] = {0, 0xc0, 0xe0, 0xf0};
    *at++ = (char)(first[more] | code >> 6 * more);
    while (more--) *at++ = (char)(0x80 | (code >> 6 * more & 0x3f));
    return at;
}

static int read_hex(Json *json, uint32_t *code)
{
    if (json->end - json->at < 4) return 0;
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c = *json->at++;
        uint32_t lower = (uint32_t)(unsigned char)c | 0x20;
        if (is(c, DIGIT)) *code = *code << 4 | (uint32_t)(c - '0');
        else if (lower >= 'a' && lower <= 'f') *code = *code << 4 | (lower - 'a' + 10);
        else return 0;
    }
    return 1;
}

/* Read a backslash and what follows. */
static char *read_escape(Json *json, char *out)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (++json->at == json->end) return NULL;
    char name = *json->at++;
    if (name != 'u') {
        const char *found = memchr(names, name, sizeof names - 1);
        if (found == NULL) return NULL;
        *out++ = values[found - names];
        return out;
    }
    uint32_t code, low;
    if (!read_hex(json, &code)) return NULL;
    if (code >= 0xd800 && code < 0xe000) { /* a half of a pair */
        if (code >= 0xdc00 || json->end - json->at < 2 || json->at[0] != '\\' || json->at[1] != 'u') return NULL;
        json->at += 2;
        if (!read_hex(json, &low) || low < 0xdc00 || low >= 0xe000) return NULL;
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    return put_character(out, code);
}

/* Read a character of several bytes, in valid UTF-8 only. */
static char *read_wide(Json *json, char *out)
{
    unsigned char first = (unsigned char)*json->at;
    int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    if (first < 0xc2 || first > 0xf4 || json->end - json->at <= more) return NULL;
    uint32_t code = first & (0x3fu >> more);
    for (int i = 1; i <= more; i++) {
        unsigned char next = (unsigned char)json->at[i];
        if ((next & 0xc0) != 0x80) return NULL;
        code = code << 6 | (next & 0x3fu);
    }
    if (code < least[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return NULL;
    memcpy(out, json->at, (size_t)more + 1);
    json->at += more + 1;
    return out + more + 1;
}

/* Whether a character of a string stands for itself; as a table for single ones, and as a sum for a row of them. */
static unsigned char plain[256];

static unsigned char is_plain(char c)
{
    unsigned char byte = (unsigned char)c;
    return (unsigned char)((byte >= 0x20) & (byte < 0x80) & (byte != '"') & (byte != '\\'));
}

/* Read a string; return the end of what was written. That is never longer than what was read. */
static char *read_string(Json *json, char *out)
{
    if (!read_mark(json, '"')) return NULL;
    while (out != NULL) {
        const char *at = json->at, *end = json->end;
        for (; end - at >= ROW; at += ROW, out += ROW) {
            unsigned char are_plain = 1;
            for (int i = 0; i < ROW; i++) are_plain &= is_plain(at[i]);
            if (!are_plain) break;
            memcpy(out, at, ROW);
        }
        while (at < end && plain[(unsigned char)*at]) *out++ = *at++;
        json->at = at;
        if (at == end) return NULL;
        if (*at == '"') {
            json->at++;
            return out;
        }
        if (*at == '\\') out = read_escape(json, out);
        else out = (unsigned char)*at >= 0x80 ? read_wide(json, out) : NULL;
    }
    return NULL;
}

static int read_number(Json *json, uint64_t *number)
{
    skip_spaces(json);
    const char *start = json->at;
    for (*number = 0; json->at < json->end && is(*json->at, DIGIT); json->at++) {
        if (json->at - start == 18) return 0;
        *number = 10 * *number + (uint64_t)(*json->at - '0');
    }
    Py_ssize_t digits = json->at - start;
    return digits == 1 || (digits > 1 && *start != '0');
}

static int skip_value(Json *json, char *room)
{
    static const char *const words[] = {"null", "true", "false"};
    uint64_t number;
    skip_spaces(json);
    if (json->at == json->end) return 0;
    if (*json->at == '"') return read_string(json, room) != NULL;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(json->end - json->at) < length || memcmp(json->at, words[i], length) != 0) continue;
        json->at += length;
        return 1;
    }
    if (*json->at == '-') json->at++;
    return json->at < json->end && is(*json->at, DIGIT) && read_number(json, &number);
}

static int is_text(const char *start, const char *end, const char *text)
{
    return (size_t)(end - start) == strlen(text) && memcmp(start, text, strlen(text)) == 0;
}

typedef struct {
    char *message, *end; /* without its line ending */
    uint64_t ms;
    unsigned char stream; /* of tailspan.logs.page.Stream */
} Entry;

/* Read an entry of a log, and write its message at `out`. */
static int read_entry(Json *json, Entry *entry, char *out)
{
    enum { MESSAGE = 1, TIME = 2, STREAM = 4 };
    int found = 0;
    entry->stream = 0;
    if (!read_mark(json, '{')) return 0;
    do {
        char *key_end = read_string(json, out), *end;
        if (key_end == NULL || !read_mark(json, ':')) return 0;
        int key = is_text(out, key_end, "message") ? MESSAGE : is_text(out, key_end, "timestamp") ? TIME
                  : is_text(out, key_end, "stream") ? STREAM : 0;
        if (found & key) return 0;
        found |= key;
        skip_spaces(json);
        if (key == MESSAGE) {
            if ((end = read_string(json, out)) == NULL) return 0;
            entry->message = out;
            out = entry->end = end;
        } else if (key == TIME) {
            if (!read_number(json, &entry->ms) || entry->ms > MAX_MS) return 0;
        } else if (key == STREAM && json->at < json->end && *json->at == '"') {
            if ((end = read_string(json, out)) == NULL) return 0;
            entry->stream = is_text(out, end, "stdout") ? 1 : is_text(out, end, "stderr") ? 2 : 0;
        } else if (!skip_value(json, out)) return 0;
    } while (read_mark(json, ','));
    if (!(found & MESSAGE) || !(found & TIME) || !read_mark(json, '}')) return 0;
    if (entry->end > entry->message && entry->end[-1] == '\n') {
        entry->end--;
        if (entry->end > entry->message && entry->end[-1] == '\r') entry->end--;
    }
    return 1;
}

/* The entries of a page: their text, and the columns that `tailspan.services.fused.stream.Entries` has. */
typedef struct {
    char *text, *at; /* its start, and where the next message is written */
    Py_ssize_t lines, bytes, ends[MAX_NUMBERED];
    unsigned char streams[MAX_NUMBERED];
    int is_text; /* whether no line has a newline within */
    PyObject *instants, *counts; /* NULL: no entry came yet */
    uint64_t ms;
    Py_ssize_t count; /* of the last instant */
} Entries;

static int append(PyObject *list, PyObject *item)
{
    int failed = item == NULL || PyList_Append(list, item) < 0;
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

static int end_instant(Entries *entries)
{
    if (!entries->count) return 0;
    int failed = append(entries->instants, PyLong_FromUnsignedLongLong(entries->ms)) < 0 ||
                 append(entries->counts, PyLong_FromSsize_t(entries->count)) < 0;
    entries->count = 0;
    return failed ? -1 : 0;
}

static PyObject *lines_of_entries(const Entries *entries)
{
    if (entries->is_text) return PyBytes_FromStringAndSize(entries->text, entries->at - entries->text);
    PyObject *lines = PyList_New(0);
    const char *start = entries->text;
    for (Py_ssize_t i = 0; lines != NULL && i < entries->lines; i++) {
        const char *end = entries->text + entries->ends[i];
        if (append(lines, PyBytes_FromStringAndSize(start, end - start)) < 0) Py_CLEAR(lines);
        start = end + 1;
    }
    return lines;
}

/* Add the entries of a page to the list, if there are any, and begin the next page. */
static int end_entries(Entries *entries, PyObject *pages)
{
    int failed = 0;
    if (entries->lines) {
        PyObject *lines = end_instant(entries) < 0 ? NULL : lines_of_entries(entries);
        failed = lines == NULL || append(pages, Py_BuildValue("NOOy#", lines, entries->instants, entries->counts,
                                                              (char *)entries->streams, entries->lines)) < 0;
    }
    Py_CLEAR(entries->instants);
    Py_CLEAR(entries->counts);
    entries->text = entries->at;
    entries->lines = entries->bytes = 0;
    entries->is_text = 1;
    return failed ? -1 : 0;
}

static int add_entry(Entries *entries, const Entry *entry, PyObject *pages)
{
    Py_ssize_t length = entry->end - entry->message;
    int is_full = entries->lines == MAX_NUMBERED || (entries->lines && length > MAX_PAGE_BYTES - entries->bytes);
    if (is_full && end_entries(entries, pages) < 0) return -1;
    if (entries->instants == NULL) {
        entries->instants = PyList_New(0);
        entries->counts = PyList_New(0);
        if (entries->instants == NULL || entries->counts == NULL) return -1;
    }
    if (entry->ms != entries->ms && end_instant(entries) < 0) return -1;
    entries->ms = entry->ms;
    entries->count++;
    entries->bytes += length;
    if (length && memchr(entry->message, '\n', (size_t)length) != NULL) entries->is_text = 0;
    *entry->end = '\n';
    entries->at = entry->end + 1;
    entries->ends[entries->lines] = entry->end - entries->text;
    entries->streams[entries->lines++] = entry->stream;
    return 0;
}

/* Return 1; 0 for what only the form in Python reads; -1 for an error. */
static int read_entries(Json *json, Entries *entries, PyObject *pages)
{
    if (!read_mark(json, '[')) return 0;
    if (!read_mark(json, ']')) {
        do {
            Entry entry;
            if (!read_entry(json, &entry, entries->at)) return 0;
            if (add_entry(entries, &entry, pages) < 0) return -1;
        } while (read_mark(json, ','));
        if (!read_mark(json, ']')) return 0;
    }
    skip_spaces(json);
    if (json->at != json->end) return 0;
    return end_entries(entries, pages) < 0 ? -1 : 1;
}

PyDoc_STRVAR(usual_entries_doc, "usual_entries(json, /)\n--\n\n"
"See `tailspan.services.fused.stream.entries_in_python`; None for a text that only the form in Python reads.");

static PyObject *usual_entries(PyObject *Py_UNUSED(module), PyObject *object)
{
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0) return NULL;
    Json json = {view.buf, (const char *)view.buf + view.len};
    PyObject *pages = PyList_New(0);
    Entries *entries = PyMem_Calloc(1, sizeof *entries);
    char *text = PyMem_Malloc((size_t)view.len + 1);
    int result = -1;
    if (pages != NULL && (entries == NULL || text == NULL)) PyErr_NoMemory();
    else if (pages != NULL) {
        entries->text = entries->at = text;
        entries->is_text = 1;
        result = read_entries(&json, entries, pages);
        Py_CLEAR(entries->instants);
        Py_CLEAR(entries->counts);
    }
    PyMem_Free(text);
    PyMem_Free(entries);
    PyBuffer_Release(&view);
    if (result == 1) return pages;
    Py_XDECREF(pages);
    if (result == 0) Py_RETURN_NONE;
    return NULL;
}

#ifdef __linux__
#include <unistd.h>
#include <sys/syscall.h>

PyDoc_STRVAR(system_call_doc, "system_call(number, first, second, third=0, /)\n--\n\n"
"See `tailspan.local.process_tree`.");

static PyObject *system_call(PyObject *Py_UNUSED(module), PyObject *args)
{
    long number, first, third = 0;
    PyObject *second;
    if (!PyArg_ParseTuple(args, "llO|l", &number, &first, &second, &third)) return NULL;
    long value;
    if (PyBytes_Check(second)) value = (long)(intptr_t)PyBytes_AsString(second);
    else value = PyLong_AsLong(second);
    if (PyErr_Occurred()) return NULL;
    return PyLong_FromLong(syscall(number, first, value, third, 8L));
}
#endif

static PyMethodDef methods[] = {
#ifdef __linux__
    {"system_call", system_call, METH_VARARGS, system_call_doc},
#endif
    {"count_lines", count_lines, METH_O, count_lines_doc},
    {"distinct_digests", distinct_digests, METH_VARARGS, distinct_digests_doc},
    {"find_severities", find_severities, METH_O, find_severities_doc},
    {"frame", frame, METH_VARARGS, frame_doc},
    {"lines_end", lines_end, METH_VARARGS, lines_end_doc},
    {"sum_digests", sum_digests, METH_O, sum_digests_doc},
    {"usual_attributes", usual_attributes, METH_VARARGS, usual_attributes_doc},
    {"usual_entries", usual_entries, METH_O, usual_entries_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_compiled",
    .m_doc = "The functions that run for every line or attribute, in C.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    fill_classes();
    for (int c = 0; c < 256; c++) plain[c] = is_plain((char)c);
    return PyModuleDef_Init(&definition);
}
