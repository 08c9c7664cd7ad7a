"""The value of a second aim."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("tickets", sa.Column("second_value", sa.Float(precision=53), nullable=True))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("tickets", "second_value")
