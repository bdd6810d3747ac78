"""The checkpoint store: acked cursors, ledgers, spans and run totals in SQLite.

Everything that is read from or written to the store's file belongs here; nothing here may interpret a ledger.
"""
