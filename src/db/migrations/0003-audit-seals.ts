import { Migration } from '@mikro-orm/migrations'

/**
 * Seals over audit events and decisions: `audit/seals.ts` says what they are.
 *
 * Instances of the version before go on writing rows without seals: verification names these, so verify from the time on
 * at which the last of them has gone.
 */
export class AuditSeals extends Migration {
  override async up(): Promise<void> {
    this.addSql(`
      create table audit_seals (
        at timestamptz not null,
        writer uuid not null,
        sequence bigint not null,
        instance_id text not null,
        previous bytea,
        previous_at timestamptz,
        closing boolean not null,
        anchors jsonb not null,
        rows bytea not null,
        first_at_us bigint,
        last_at_us bigint,
        key_id text not null,
        hash bytea not null,
        primary key (writer, sequence, at)
      ) partition by range (at)`)
    this.addSql('create table audit_seals_default partition of audit_seals default')
    this.addSql(`
      create trigger audit_seals_append_only before update or delete on audit_seals
      for each row execute function refuse_change()`)
    // The MAC of an event that was committed outside of the journal's batches.
    this.addSql('alter table audit_events add column mac text')
  }

  override async down(): Promise<void> {
    this.addSql('alter table audit_events drop column mac')
    this.addSql('drop table audit_seals')
  }
}
