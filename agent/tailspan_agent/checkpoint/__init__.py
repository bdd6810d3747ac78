"""The checkpoint store: acknowledged cursors, ledgers, spans and run totals in SQLite.

All reads and writes of the store's file belong here. Nothing here may interpret a ledger.
"""
