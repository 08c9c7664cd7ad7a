"""What trials ran on: data, machines and their load, tracebacks; how far a study's own curves are shown."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns, and the table of loads."""
    op.add_column("tuner_studies", sa.Column("parent_trials", sa.Integer(), server_default="0", nullable=False))
    op.add_column("tuner_studies", sa.Column("data", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("workers", sa.Column("environment", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("tickets", sa.Column("traceback", sa.Text(), nullable=True))
    op.create_table(
        "loads",
        sa.Column("worker_id", sa.String(length=64), nullable=False),
        sa.Column("sampled_at", sa.Float(precision=53), nullable=False),
        sa.Column("study_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("cpu_percent", sa.Float(precision=53), nullable=False),
        sa.Column("memory_mb", sa.Float(precision=53), nullable=False),
        sa.Column("gpu_memory_mb", sa.Float(precision=53), nullable=True),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["study_id"], ["tuner_studies.id"], name=op.f("fk_loads_study_id"), ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_loads_worker_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("worker_id", "sampled_at", name=op.f("pk_loads")),
    )
    op.create_index(op.f("ix_loads_study_id_published"), "loads", ["study_id", "published"], unique=False)


def downgrade() -> None:
    """Drop them again."""
    op.drop_index(op.f("ix_loads_study_id_published"), table_name="loads")
    op.drop_table("loads")
    op.drop_column("tickets", "traceback")
    op.drop_column("workers", "environment")
    op.drop_column("tuner_studies", "data")
    op.drop_column("tuner_studies", "parent_trials")
