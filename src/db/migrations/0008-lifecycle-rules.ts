import { Migration } from '@mikro-orm/migrations'

/** What becomes of devices that have not been seen for long: `admin/lifecycle.ts`. The version before knows no such rules. */
export class LifecycleRules extends Migration {
  override async up(): Promise<void> {
    this.addSql(`
      create table lifecycle_rules (
        id text primary key,
        labels jsonb not null,
        action text not null check (action in ('quarantine', 'delete')),
        unseen_days int not null check (unseen_days > 0),
        created_at timestamptz not null
      )`)
  }

  override async down(): Promise<void> {
    this.addSql('drop table lifecycle_rules')
  }
}
