import { Migration } from '@mikro-orm/migrations'

/**
 * Connections that wait to be resumed: `access/leases.ts` says when they do.
 *
 * Instances of the version before end the connections of a stream with it, and write that when they have noticed. Nothing is
 * taken over from them (`hands_over`), or they would end on record what another holds.
 */
export class LeaseResume extends Migration {
  override async up(): Promise<void> {
    this.addSql('alter table connections add column resume_by timestamptz')
    this.addSql(`
      create index connections_waiting on connections (resume_by) where status = 'active' and resume_by is not null`)
    this.addSql('alter table instances add column hands_over boolean not null default false')
  }

  override async down(): Promise<void> {
    this.addSql('alter table instances drop column hands_over')
    this.addSql('drop index connections_waiting')
    this.addSql('alter table connections drop column resume_by')
  }
}
